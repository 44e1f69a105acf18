import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toughen import rng
from toughen.data.augment import Crop, CropFlip, CropShift, Flip


def numbered(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Images in which every pixel of an image is different, and none is 0."""
    count = channels * height * width
    assert count < 255
    return (1 + torch.arange(count, dtype=torch.uint8)).view(1, channels, height, width).repeat(batch, 1, 1, 1)


def padded_and_indexed(images: Tensor, pad: int, draws: torch.Generator) -> Tensor:
    """Crop and mirror as earlier versions did, whose runs must stay reproducible."""
    batch, _, height, width = images.shape
    shift = torch.randint(2 * pad + 1, (2, batch, 1), generator=draws)
    mirrored = torch.randint(2, (batch, 1), generator=draws).bool()
    rows, cols = torch.arange(height).expand(batch, height), torch.arange(width).expand(batch, width)
    cols = torch.where(mirrored, width - 1 - cols, cols)
    rows, cols = (rows + shift[0])[:, :, None], (cols + shift[1])[:, None, :]
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    return padded[torch.arange(batch)[:, None, None], rows, cols].permute(0, 3, 1, 2)


def crops(image: Tensor, pad: int) -> list[Tensor]:
    _, height, width = image.shape
    padded = F.pad(image, (pad, pad, pad, pad))
    shifts = range(2 * pad + 1)
    return [padded[:, top : top + height, left : left + width] for top in shifts for left in shifts]


sizes = {"channels": st.integers(1, 3), "height": st.integers(1, 6), "width": st.integers(1, 6)}


@given(seed=st.integers(0, 10_000), pad=st.integers(0, 8), **sizes)
def test_crop_flip_is_bit_identical_to_crop_then_flip_and_to_what_it_always_was(
    seed: int, pad: int, channels: int, height: int, width: int
) -> None:
    images = numbered(5, channels, height, width)
    draws = rng.generator(seed, "test")

    out = CropFlip(pad)(images, rng.generator(seed, "test"))

    assert torch.equal(out, Flip()(Crop(pad)(images, draws), draws))
    assert torch.equal(out, padded_and_indexed(images, pad, rng.generator(seed, "test")))


@given(seed=st.integers(0, 10_000), pad=st.integers(0, 3), **sizes)
def test_every_result_of_crop_is_a_crop_of_the_padded_image(
    seed: int, pad: int, channels: int, height: int, width: int
) -> None:
    images = numbered(3, channels, height, width)
    for image, result in zip(images, Crop(pad)(images, rng.generator(seed, "test")), strict=True):
        assert any(torch.equal(result, crop) for crop in crops(image, pad))


def test_all_shifts_and_both_directions_occur_about_equally_often() -> None:
    images = numbered(1800, 1, 4, 4)
    out = CropFlip(1)(images, rng.generator(0, "test"))
    allowed = crops(images[0], 1)
    allowed += [crop.flip(-1) for crop in allowed]
    counts = [int((out == crop).flatten(1).all(dim=1).sum()) for crop in allowed]
    assert sum(counts) == 1800
    assert min(counts) > 60  # 100 expected for each of 18, standard deviation 10
    assert max(counts) < 140


def test_crop_without_padding_changes_nothing() -> None:
    images = numbered(2, 3, 4, 4)
    assert torch.equal(Crop(0)(images, rng.generator(0, "test")), images)


def test_flip_mirrors_half_of_the_images_and_leaves_the_others() -> None:
    images = numbered(1000, 1, 2, 3)
    out = Flip()(images, rng.generator(0, "test"))
    mirrored = (out == images.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(out[~mirrored], images[~mirrored])
    assert 437 < int(mirrored.sum()) < 563  # four standard deviations


def test_crop_shift_that_cuts_nothing_changes_nothing() -> None:
    images = numbered(4, 3, 5, 6)
    assert torch.equal(CropShift(0, 1)(images, rng.generator(0, "test")), images)


@given(
    seed=st.integers(0, 10_000),
    channels=st.integers(1, 2),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    low=st.integers(0, 2),
    more=st.integers(1, 3),
)
def test_crop_shift_shows_one_window_of_the_image_and_cuts_as_much_as_it_says(
    seed: int, channels: int, height: int, width: int, low: int, more: int
) -> None:
    images = numbered(6, channels, height, width)
    for image, result in zip(images, CropShift(low, low + more)(images, rng.generator(seed, "test")), strict=True):
        rows, cols = result[0].any(dim=1).nonzero().flatten(), result[0].any(dim=0).nonzero().flatten()
        window = result[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        top, left = divmod(int(window[0, 0, 0]) - 1, width)
        assert torch.equal(window, image[:, top : top + len(rows), left : left + len(cols)])
        assert int((result != 0).sum()) == channels * len(rows) * len(cols)  # and nothing else is shown
        assert low <= (height - len(rows)) + (width - len(cols)) < low + more


@pytest.mark.parametrize("axis", [1, 2], ids=["rows", "columns"])
def test_crop_shift_draws_size_window_and_place_uniformly(axis: int) -> None:
    count = 6000
    images = numbered(count, 1, 6, 6)
    out = CropShift(0, 3)(images, rng.generator(0, "test"))
    shown = out[:, 0].any(dim=3 - axis)  # [B, 6]
    cut = 6 - shown.sum(dim=1)
    target = shown.int().argmax(dim=1)
    corner = out.flatten(1).where(out.flatten(1) > 0, 255).amin(dim=1).int() - 1
    start = (corner // 6, corner % 6)[axis - 1]

    # s = 0, 1, 2 equally often, and then any share of it: 0 with 1/3 + 1/6 + 1/9, 1 with 1/6 + 1/9, 2 with 1/9
    for value, p in enumerate([11 / 18, 5 / 18, 2 / 18]):
        assert abs(int((cut == value).sum()) - count * p) < 4 * (count * p * (1 - p)) ** 0.5
    for a in range(3):
        for b in range(3):
            both = int(((cut == 2) & (start == a) & (target == b)).sum())
            assert abs(both - count / 81) < 4 * (count / 81) ** 0.5
