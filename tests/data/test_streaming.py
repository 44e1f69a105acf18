"""Images that are decoded when they are needed give what images in memory give, and can be left and taken up."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toughen.data import (
    DataSettings,
    DataSplits,
    StreamedSet,
    in_order,
    load,
    probe,
    train_loader,
)
from toughen.data.augment import Augmentation, CropFlip, CropShift, Erase, ResizedCrop
from toughen.errors import InputError
from toughen.rng import Share
from toughen.types import Batch


def noise(seed: int, *, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def fill(root: Path, *, train: int = 10, test: int = 3, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Path:
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture = noise(1000 * label + number + 100 * (part == "test"), size=size, mode=mode)
                picture.save(root / part / name / f"{number:02}.png")
    return root


def splits(root: Path, **changes: object) -> DataSplits:
    settings = {"name": f"folder:{root}", "validation": 4, "image_size": 8, "workers": 0, **changes}
    return load(DataSettings(**settings))  # type: ignore[arg-type]


def epoch(
    data: DataSplits, number: int = 0, *, start_step: int = 0, workers: int = 0, **changes: object
) -> list[Batch]:
    settings = {"batch_size": 5, "device": "cpu", "seed": 3, "augment": (CropFlip(pad=1),), **changes}
    loader = train_loader(data, workers=workers, **settings)  # type: ignore[arg-type]
    return list(loader.epoch(number, start_step=start_step))


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_streamed_batches_equal_those_from_memory(tmp_path: Path) -> None:
    root = fill(tmp_path)
    resident, streamed = (splits(root, storage=storage) for storage in ("resident", "streamed"))
    assert isinstance(streamed.train, StreamedSet)
    assert resident.mean == streamed.mean
    assert equal(epoch(resident), epoch(streamed))
    for part in ("train", "validation", "test"):
        one, two = (list(in_order(getattr(data, part), batch_size=3, device="cpu")) for data in (resident, streamed))
        assert equal(one, two)
    drawn = {"count": 7, "seed": 0, "position": 2, "device": "cpu", "batch_size": 4}
    assert equal(probe(resident.train, **drawn), probe(streamed.train, **drawn))  # type: ignore[arg-type]


@pytest.mark.parametrize("augment", [(CropFlip(pad=1),), (ResizedCrop(), CropFlip(pad=1))])
def test_worker_processes_change_nothing_and_an_epoch_can_start_in_its_middle(
    tmp_path: Path, augment: tuple[Augmentation, ...]
) -> None:
    data = splits(fill(tmp_path), storage="streamed")
    here = epoch(data, 1, augment=augment)
    assert equal(here, epoch(data, 1, augment=augment, workers=2))
    assert equal(here[2:], epoch(data, 1, start_step=2, augment=augment))
    assert not equal(here, epoch(data, 2, augment=augment))


def test_random_crops_are_taken_from_the_original_picture(tmp_path: Path) -> None:
    root = fill(tmp_path, size=(64, 64))
    data = splits(root, storage="streamed")
    small = ResizedCrop(scale=(0.015625, 0.015625), ratio=(1.0, 1.0))  # 8x8 of 64x64, so nothing is resized
    originals = [np.asarray(Image.open(path)) for path in sorted(root.glob("train/*/*.png"))]
    for image in (batch.x[0] for batch in epoch(data, augment=(small,))):
        window = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        found = [
            np.array_equal(original[top : top + 8, left : left + 8], window)
            for original in originals
            for top in range(57)
            for left in range(57)
            if original[top, left, 0] == window[0, 0, 0]
        ]
        assert any(found)


def test_the_middle_of_a_picture_is_kept_not_squeezed(tmp_path: Path) -> None:
    root = fill(tmp_path)
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    for path in root.glob("test/*/*.png"):
        Image.fromarray(wide).save(path)
    for storage in ("resident", "streamed"):
        batch = next(iter(in_order(splits(root, storage=storage).test, batch_size=2, device="cpu")))
        assert (batch.x * 255).round().unique().tolist() == [200]
    half = next(iter(in_order(splits(root, image_size=4, center=0.5).test, batch_size=2, device="cpu")))
    assert half.x.shape[-2:] == (4, 4)


def test_what_does_not_fit_is_streamed_and_the_choice_is_told(tmp_path: Path) -> None:
    root = fill(tmp_path)
    assert any("kept in memory" in note for note in splits(root).notes)
    small = splits(root, resident_share=1e-9, workers=2)
    assert isinstance(small.train, StreamedSet)
    assert small.notes == ("images are streamed by 2 worker processes",)
    with pytest.raises(InputError, match=r"26 images of 12x8 need 0\.0 GiB.*set data\.image_size"):
        splits(root, resident_share=1e-9, image_size=None)


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_processes_that_train_together_deal_out_the_batches_of_one(tmp_path: Path, storage: str) -> None:
    data = splits(fill(tmp_path), storage=storage, validation=1)  # 19 images
    augment = (CropFlip(pad=3), CropShift(high=4), Erase())
    whole = epoch(data, batch_size=8, augment=augment)
    parts = [epoch(data, batch_size=4, augment=augment, share=Share(index, 2)) for index in (0, 1)]

    assert [len(part) for part in (whole, *parts)] == [2, 2, 2]
    for step, batch in enumerate(whole):
        for index, part in enumerate(parts):
            assert torch.equal(part[step].x, batch.x[index::2])
            assert torch.equal(part[step].index, batch.index[index::2])  # type: ignore[arg-type, index]


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_broken_pictures_are_skipped_and_counted_if_asked(tmp_path: Path, storage: str) -> None:
    root = fill(tmp_path)
    (root / "train" / "cat" / "03.png").write_bytes(b"not a picture")
    (root / "train" / "dog" / "00.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot decode the image .*(cat/03|dog/00)\.png"):
        epoch(splits(root, storage=storage, validation=1), workers=0)
    data = splits(root, storage=storage, on_error="skip", validation=1)
    loader = train_loader(data, batch_size=len(data.train), device="cpu", seed=0)
    shown = sum(len(batch.x) for batch in loader.epoch(0))
    seen = shown + sum(len(batch.x) for batch in in_order(data.validation, batch_size=5, device="cpu"))
    assert seen == 18
    if storage == "resident":
        assert any(note.startswith("skipped 2 images that cannot be decoded") for note in data.notes)


def test_batches_of_which_nothing_is_left_are_passed_over_in_order_and_named_in_training(tmp_path: Path) -> None:
    root = fill(tmp_path)
    for path in [*sorted(root.glob("test/*/*.png"))[:3], *root.glob("train/cat/0[0-8].png")]:
        path.write_bytes(b"broken")
    data = splits(root, storage="streamed", on_error="skip", validation=1)
    assert sum(len(batch.y) for batch in in_order(data.test, batch_size=1, device="cpu")) == 3
    drawn = probe(data.train, count=5, seed=0, position=0, device="cpu", batch_size=2)
    assert sum(len(batch.y) for batch in drawn) == 5  # broken ones are made up for
    with pytest.raises(InputError, match=r"none of the images of a batch can be decoded"):
        epoch(data, batch_size=1)


def test_a_class_that_is_skipped_as_a_whole_is_named(tmp_path: Path) -> None:
    root = fill(tmp_path)
    for path in root.glob("train/cat/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"no training image of the class 'cat' \(label 0\) that can be read"):
        splits(root, on_error="skip", validation=1)


@pytest.mark.parametrize(("mode", "level"), [("F", 0.5), ("I", 200), ("I", 70_000)])
def test_levels_of_unknown_range_are_refused_rather_than_guessed(tmp_path: Path, mode: str, level: float) -> None:
    root = fill(tmp_path)
    Image.new(mode, (12, 8), level).save(root / "test" / "cat" / "00.png", format="tiff")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"00\.png: .*save it with 8 or 16 bits"):
        splits(root)


def test_a_broken_picture_met_by_a_worker_is_one_line(tmp_path: Path) -> None:
    root = fill(tmp_path)
    (root / "train" / "cat" / "03.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"^cannot decode the image .*cat/03\.png: [^\n]*$"):
        epoch(splits(root, storage="streamed", validation=1), workers=1, batch_size=19)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    root = fill(tmp_path)
    Image.new("1", (20_000, 10_000)).save(root / "train" / "cat" / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"cannot decode the image .*bomb\.png: .*200000000 pixels"):
            splits(root)


def test_grey_pictures_stay_grey_and_can_be_made_colour(tmp_path: Path) -> None:
    root = fill(tmp_path, mode="L")
    for storage in ("resident", "streamed"):
        assert splits(root, storage=storage).train.shape == (1, 8, 8)
        assert splits(root, storage=storage, channels=3).train.shape == (3, 8, 8)


def test_large_jpegs_are_decoded_at_a_fraction_and_look_the_same(tmp_path: Path) -> None:
    root = fill(tmp_path)
    smooth = noise(0, size=(6, 6)).resize((400, 400), Image.Resampling.BICUBIC)
    for path in root.glob("test/*/*.png"):
        smooth.save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    found = next(iter(in_order(splits(root, image_size=20).test, batch_size=1, device="cpu"))).x[0]
    buffer = io.BytesIO()
    smooth.save(buffer, format="jpeg", quality=95)
    whole = Image.open(buffer).resize((20, 20), Image.Resampling.BOX)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    assert (found - expected).abs().mean() < 4 / 255


def test_the_checksum_is_that_of_the_pixels_however_they_are_kept(tmp_path: Path) -> None:
    root = fill(tmp_path)
    resident, streamed = (splits(root, storage=storage) for storage in ("resident", "streamed"))
    assert resident.test.digest() == streamed.test.digest()
    assert streamed.test.digest() != streamed.test.subset(slice(1, None)).digest()
