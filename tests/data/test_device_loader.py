from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toughen.data import DeviceLoader, ImageSet, in_order, probe
from toughen.data.augment import Augmentation, Crop, CropFlip, Cutout, Flip
from toughen.errors import InputError
from toughen.types import Batch

N = 23


def image_set() -> ImageSet:
    """Images of 3x4 pixels whose level is 10 x the row, so that a pixel tells where it came from."""
    levels = torch.arange(N, dtype=torch.uint8) * 10
    return ImageSet(levels.view(N, 1, 1, 1).repeat(1, 1, 3, 4), torch.arange(N) % 3, ("a", "b", "c"))


def loader(**changes: Any) -> DeviceLoader:
    return DeviceLoader(image_set(), **{"batch_size": 5, "device": "cpu", "seed": 0, **changes})


def positions(batches: list[Batch]) -> list[int]:
    assert all(batch.index is not None for batch in batches)
    return [position for batch in batches for position in batch.index.tolist()]  # type: ignore[union-attr]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def unchanged(batches: list[Batch]) -> bool:
    images = image_set()
    return all(
        torch.equal(batch.x, images.images[batch.index] / 255) and torch.equal(batch.y, images.labels[batch.index])
        for batch in batches
    )


@given(
    epoch=st.integers(0, 5),
    batch_size=st.integers(1, N),
    augment=st.sampled_from([(), (Crop(pad=1),), (CropFlip(pad=1),), (Flip(), Cutout(size=1))]),
    data=st.data(),
)
def test_starting_at_a_step_gives_the_tail_of_the_full_epoch(
    epoch: int, batch_size: int, augment: tuple[Augmentation, ...], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, N // batch_size))
    make = {"batch_size": batch_size, "augment": augment}
    full = list(loader(**make).epoch(epoch))
    assert equal(list(loader(**make).epoch(epoch, start_step=start)), full[start:])


@given(epoch=st.integers(0, 20), batch_size=st.integers(1, N))
def test_an_epoch_shows_no_image_twice_and_drops_the_partial_batch(epoch: int, batch_size: int) -> None:
    images = loader(batch_size=batch_size)
    batches = list(images.epoch(epoch))
    assert len(batches) == images.steps_per_epoch == N // batch_size
    assert {len(batch.x) for batch in batches} == {batch_size}
    assert len(set(positions(batches))) == batch_size * (N // batch_size)


def test_without_augmentation_batches_hold_the_images_scaled_to_one_and_their_labels() -> None:
    batches = list(loader(augment=()).epoch(0))
    assert unchanged(batches)
    assert batches[0].x.dtype == torch.float32


def test_augmented_batches_keep_labels_and_differ_between_epochs_and_steps() -> None:
    bright = ImageSet(torch.full((N, 1, 3, 4), 255, dtype=torch.uint8), torch.arange(N) % 3, ("a", "b", "c"))
    batches = [
        batch
        for epoch in (0, 1)
        for batch in DeviceLoader(bright, batch_size=11, device="cpu", seed=0, augment=(CropFlip(pad=2),)).epoch(epoch)
    ]
    assert all(torch.equal(batch.y, bright.labels[batch.index]) for batch in batches)
    # All images are the same here, so equal batches would mean equal shifts.
    assert not any(torch.equal(a.x, b.x) for i, a in enumerate(batches) for b in batches[:i])


@pytest.mark.parametrize(("augment", "mirrors"), [(Crop(pad=0), False), (CropFlip(pad=0), True)])
def test_only_crop_flip_mirrors(augment: Augmentation, mirrors: bool) -> None:
    ramp = torch.arange(4, dtype=torch.uint8).expand(N, 1, 3, 4)
    images = ImageSet(ramp, torch.zeros(N).long(), ("a",))
    batch = next(DeviceLoader(images, batch_size=N, device="cpu", seed=0, augment=(augment,)).epoch(0))
    assert bool((batch.x[..., 0] > batch.x[..., -1]).any()) is mirrors


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = positions(list(loader().epoch(0)))
    assert positions(list(loader().epoch(0))) == first
    assert positions(list(loader().epoch(1))) != first
    assert positions(list(loader(seed=1).epoch(0))) != first


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(loader().epoch(0))
    probe(image_set(), count=5, seed=0, position=0, device="cpu", batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [0, 24])
def test_a_batch_size_that_does_not_fit_is_named_beside_the_number_of_images(batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"batch_size is {batch_size}; with 23 images it must be 1\.\.23"):
        loader(batch_size=batch_size)


@pytest.mark.parametrize("start_step", [-1, 5])
def test_a_start_step_outside_the_epoch_is_refused_at_once(start_step: int) -> None:
    with pytest.raises(InputError, match=f"start_step is {start_step}; the epoch has 4 steps"):
        loader().epoch(0, start_step=start_step)


def test_in_order_shows_every_image_once_as_it_is_with_the_partial_batch() -> None:
    batches = list(in_order(image_set(), batch_size=10, device="cpu"))
    assert [len(batch.x) for batch in batches] == [10, 10, 3]
    assert positions(batches) == list(range(N))
    assert unchanged(batches)


def test_in_order_refuses_an_empty_batch_at_once() -> None:
    with pytest.raises(InputError, match="batch_size is 0; it must be at least 1"):
        in_order(image_set(), batch_size=0, device="cpu")


@given(count=st.integers(1, N), batch_size=st.integers(1, 30), position=st.integers(0, 9))
def test_a_probe_is_so_many_different_images_as_they_are(count: int, batch_size: int, position: int) -> None:
    batches = probe(image_set(), count=count, seed=0, position=position, device="cpu", batch_size=batch_size)
    assert len(set(positions(batches))) == len(positions(batches)) == count
    assert {len(batch.x) for batch in batches[:-1]} <= {batch_size}
    assert unchanged(batches)


def test_a_probe_depends_on_seed_and_position_alone() -> None:
    def drawn(seed: int, position: int, batch_size: int) -> list[int]:
        return positions(probe(image_set(), count=9, seed=seed, position=position, device="cpu", batch_size=batch_size))

    assert drawn(0, 3, 2) == drawn(0, 3, 9)
    assert drawn(0, 3, 2) != drawn(0, 4, 2)
    assert drawn(0, 3, 2) != drawn(1, 3, 2)


def test_a_probe_larger_than_the_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"count is 24; with 23 images it must be 1\.\.23"):
        probe(image_set(), count=24, seed=0, position=0, device="cpu", batch_size=5)
