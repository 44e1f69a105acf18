"""Where each pixel of an augmented image came from: the stored image gives the augmented one back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from toughen.data import (
    AUGMENTS,
    DataSettings,
    DataSplits,
    DeviceLoader,
    ImageSet,
    StreamedSet,
    from_torch,
    load,
    train_loader,
)
from toughen.data.augment import (
    Augmentation,
    ColourShape,
    Crop,
    CropFlip,
    CropShift,
    Cutout,
    Erase,
    Flip,
    IDBHWeak,
    ResizedCrop,
)
from toughen.errors import InputError
from toughen.types import Batch

N = 12
MOVING = [
    (),
    (Crop(pad=2),),
    (Flip(),),
    (CropFlip(pad=2),),
    (CropShift(high=4),),
    (Cutout(size=3),),
    (Erase(p=0.7),),
    (Flip(), CropShift(high=3), Erase(p=1), CropFlip(pad=1)),
]


def image_set(channels: int = 3, height: int = 6, width: int = 5, count: int = N) -> ImageSet:
    """Images without a black pixel, so that 0 means that nothing is there."""
    draw = torch.Generator().manual_seed(0)
    levels = torch.randint(1, 256, (count, channels, height, width), generator=draw, dtype=torch.uint8)
    return ImageSet(levels, torch.arange(count) % 3, ("a", "b", "c"))


def splits(train: Any, extra: ImageSet | None = None) -> DataSplits:
    return DataSplits("test", train, train, train, extra=extra)


def loaded(data: DataSplits, augment: tuple[Augmentation, ...], epoch: int = 0, **changes: Any) -> list[Batch]:
    given = {"batch_size": 4, "device": "cpu", "seed": 0, "track_pixels": True, **changes}
    return list(train_loader(data, augment=augment, **given).epoch(epoch))


def put_together(images: Tensor, source: Tensor) -> Tensor:
    """The augmented images in [0, 1], from the stored ones and the map alone."""
    places = source.clamp_min(0).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, places).view(images.shape)
    return torch.where((source < 0)[:, None], 0, moved) / 255


@settings(max_examples=15, deadline=None)
@given(epoch=st.integers(0, 1000), channels=st.integers(1, 4), height=st.integers(4, 9), width=st.integers(4, 9))
@pytest.mark.parametrize("augment", MOVING, ids=str)
def test_the_map_gives_each_augmented_image_back_from_the_stored_one(
    augment: tuple[Augmentation, ...], epoch: int, channels: int, height: int, width: int
) -> None:
    stored = image_set(channels, height, width)
    for batch in loaded(splits(stored), augment, epoch):
        assert batch.source is not None
        assert batch.source.dtype == torch.int64
        assert torch.equal(put_together(stored.images[batch.index], batch.source), batch.x)
        assert torch.equal(batch.source < 0, batch.x[:, 0] == 0)


@pytest.mark.parametrize("augment", MOVING, ids=str)
def test_tracking_changes_no_bit_of_the_images_and_without_it_there_is_no_map(
    augment: tuple[Augmentation, ...],
) -> None:
    tracked, plain = (loaded(splits(image_set()), augment, track_pixels=t) for t in (True, False))
    for with_map, without in zip(tracked, plain, strict=True):
        assert torch.equal(with_map.x, without.x)
        assert torch.equal(with_map.index, without.index)
        assert without.source is None


def test_pixels_of_images_wider_than_256_are_told_apart() -> None:
    stored = image_set(1, 3, 70_000, count=2)
    (batch,) = loaded(splits(stored), (Flip(), Crop(pad=1)), batch_size=2)
    assert int(batch.source.max()) > 2 * 70_000
    assert torch.equal(put_together(stored.images[batch.index], batch.source), batch.x)


def test_of_a_batch_with_extra_images_those_of_the_training_set_alone_are_tracked() -> None:
    stored = image_set()
    for batch in loaded(splits(stored, extra=image_set()), (CropFlip(pad=2),), extra_fraction=0.5):
        own, extra = batch.source.split(2)
        assert torch.equal(put_together(stored.images[batch.index[:2]], own), batch.x[:2])
        assert bool((extra == -1).all())
        assert bool((batch.index[2:] >= N).all())


def test_pictures_that_are_decoded_when_they_are_needed_are_tracked_like_those_in_memory(tmp_path: Path) -> None:
    resident, streamed = (folder(tmp_path, storage) for storage in ("resident", "streamed"))
    assert isinstance(streamed.train, StreamedSet)
    pairs = zip(loaded(resident, (CropFlip(),)), loaded(streamed, (CropFlip(),)), strict=True)
    assert all(torch.equal(one.source, two.source) for one, two in pairs)
    with pytest.raises(InputError, match="augmentation resized_crop changes or blends pixels"):
        loaded(streamed, (ResizedCrop(), CropFlip()))


def folder(root: Path, storage: str) -> DataSplits:
    for number, image in enumerate(image_set(height=8, width=8, count=24).images):
        path = root / ("test" if number < 4 else "train") / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    settings = {"name": f"folder:{root}", "validation": 4, "image_size": 8, "workers": 0}
    return load(DataSettings(**settings, storage=storage))  # type: ignore[arg-type]


ALLOWED = "allowed: cutout, erase, crop, flip, crop_flip, crop_shift"


@pytest.mark.parametrize("name", ["colour_shape", "idbh_weak", "idbh_strong", "idbh_svhn", "resized_crop"])
def test_an_augmentation_that_changes_pixels_is_refused_by_name_with_those_that_are_allowed(name: str) -> None:
    with pytest.raises(InputError, match=f"augmentation {name} changes or blends pixels, .*; {ALLOWED}"):
        loaded(splits(image_set()), (Flip(), AUGMENTS[name]()))


@dataclass(frozen=True)
class Upside:
    """Somebody's own: it does not say whether it only moves pixels."""

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        return images.flip(-2)


class UpsideDown(Upside):
    moves_pixels = True


def test_an_augmentation_of_the_user_is_tracked_if_its_class_says_that_it_only_moves_pixels() -> None:
    with pytest.raises(InputError, match="augmentation Upside changes or blends pixels"):
        DeviceLoader(image_set(), batch_size=4, device="cpu", seed=0, augment=(Upside(),), track_pixels=True)
    (batch, *_) = loaded(splits(image_set(1, 2, 2)), (UpsideDown(),))
    assert batch.source[0].tolist() == [[2, 3], [0, 1]]


def test_a_data_set_that_may_vary_its_own_images_is_refused_and_one_in_memory_is_not() -> None:
    dataset = TensorDataset(image_set().images, image_set().labels)
    read_anew = from_torch(dataset, dataset, validation=4, storage="streamed")
    with pytest.raises(InputError, match=r"can't be tracked through a data set of your own .* storage='resident'"):
        loaded(read_anew, (Flip(),))
    assert loaded(from_torch(dataset, dataset, validation=4, storage="resident"), (Flip(),))[0].source is not None


def test_nothing_is_asked_of_augmentations_where_pixels_are_not_tracked() -> None:
    batches = loaded(splits(image_set(height=12, width=12)), (IDBHWeak(), ColourShape(), Upside()), track_pixels=False)
    assert all(batch.source is None for batch in batches)
