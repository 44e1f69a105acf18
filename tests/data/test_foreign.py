import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from toughen.data import ImageSet, StreamedSet, from_torch, in_order, train_loader
from toughen.data.augment import ResizedCrop
from toughen.errors import InputError


def tensors(count: int = 20, *, dtype: torch.dtype = torch.float32) -> TensorDataset:
    levels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    images = levels.to(torch.uint8) if dtype == torch.uint8 else levels.to(dtype) / 255
    return TensorDataset(images, torch.arange(count) % 2)


class Pictures(Dataset[Any]):
    """Items as image folders of torchvision give them, with names and targets."""

    classes = ("odd", "even")

    def __init__(self, form: str = "pil", *, vary: bool = False) -> None:
        self.form, self.vary = form, vary
        self.targets = [number % 2 for number in range(20)]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> tuple[Any, int]:
        if self.vary:
            draw = torch.rand(()) + random.random() + np.random.rand()
            return torch.full((3, 4, 4), float(draw) / 3), self.targets[number]
        pixels = np.full((4, 4, 3), number, dtype=np.uint8)
        image = {"pil": Image.fromarray(pixels), "array": pixels, "grey": pixels[..., 0]}[self.form]
        return image, self.targets[number]


def levels(images: Any) -> list[int]:
    return [
        int(level) for level in (next(iter(in_order(images, batch_size=99, device="cpu"))).x[:, 0, 0, 0] * 255).round()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_tensors_become_images_in_memory(dtype: torch.dtype) -> None:
    splits = from_torch(tensors(dtype=dtype), tensors(4, dtype=dtype), validation=5)
    assert isinstance(splits.train, ImageSet)
    assert levels(splits.test) == [0, 1, 2, 3]
    assert sorted(levels(splits.train) + levels(splits.validation)) == list(range(20))
    assert splits.train.classes == ("0", "1")


@pytest.mark.parametrize(("form", "channels"), [("pil", 3), ("array", 3), ("grey", 1)])
def test_pictures_and_arrays_keep_their_class_names(form: str, channels: int) -> None:
    splits = from_torch(Pictures(form), Pictures(form), validation=2)
    assert splits.train.shape == (channels, 4, 4)
    assert splits.train.classes == ("odd", "even")


def test_a_loader_stands_for_its_data_set() -> None:
    whole = Pictures()
    splits = from_torch(DataLoader(whole, batch_size=3, shuffle=True), Subset(whole, [3, 1]), validation=whole)
    assert (len(splits.train), levels(splits.test)) == (20, [3, 1])


def test_a_data_set_that_varies_its_images_is_read_anew_and_repeatably() -> None:
    splits = from_torch(Pictures(vary=True), Pictures(), validation=2)
    assert isinstance(splits.train, StreamedSet)
    make = {"batch_size": 6, "device": "cpu", "seed": 0, "augment": ()}
    first, again, other = (
        torch.cat([batch.x for batch in train_loader(splits, **make).epoch(number)])  # type: ignore[arg-type]
        for number in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    tail = torch.cat([batch.x for batch in train_loader(splits, **make).epoch(0, start_step=1)])  # type: ignore[arg-type]
    assert torch.equal(tail, first[6:])


def test_reading_leaves_the_random_states_of_the_process_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    from_torch(Pictures(vary=True), Pictures(), validation=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # type: ignore[index]


class Relabelled(Pictures):
    """Its items have other labels than its targets."""

    def __getitem__(self, number: int) -> tuple[Any, int]:
        image, label = super().__getitem__(number)
        return image, 1 - label


class Transformed(Relabelled):
    target_transform = staticmethod(lambda label: 1 - label)

    def __init__(self) -> None:
        super().__init__()
        self.targets = [0] * 16 + self.targets[16:]


@pytest.mark.parametrize("dataset", [Relabelled(), Transformed()])
def test_the_label_is_that_of_the_item_whatever_the_targets_say(dataset: Pictures) -> None:
    splits = from_torch(dataset, dataset, validation=2)
    assert splits.test.labels.tolist() == [dataset[number][1] for number in range(20)]


def test_a_data_set_that_would_not_fit_into_memory_is_not_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toughen.data.foreign.fits_memory", lambda num_bytes: num_bytes < 20 * 48)
    splits = from_torch(Pictures(), Pictures(), validation=2)
    assert isinstance(splits.train, StreamedSet)
    assert splits.notes == ("training images are read anew in each epoch",)


def test_a_random_crop_before_decoding_is_refused_for_images_of_ones_own() -> None:
    splits = from_torch(Pictures(vary=True), Pictures(), validation=2)
    with pytest.raises(InputError, match="let a data set of your own crop its images"):
        train_loader(splits, batch_size=2, device="cpu", seed=0, augment=(ResizedCrop(),))


def test_images_that_vary_where_they_must_not_are_told_or_refused() -> None:
    with pytest.raises(InputError, match="the test images vary at random when they are read again"):
        from_torch(Pictures(), Pictures(vary=True), validation=2)
    assert any(
        "held out of a data set that varies" in n
        for n in from_torch(Pictures(vary=True), Pictures(), validation=2).notes
    )


def test_a_class_without_a_training_image_is_named() -> None:
    with pytest.raises(InputError, match=r"no training image of the class '2' \(label 2\)"):
        from_torch(tensors(), TensorDataset(torch.zeros(1, 1, 4, 4), torch.tensor([2])), validation=2)


def labelled(label: Any) -> list[Any]:
    return [(torch.zeros(1, 2, 2), label)] * 4


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def spoiled(value: float) -> TensorDataset:
    images = torch.zeros(6, 1, 2, 2)
    images[3, 0, 1, 1] = value
    return TensorDataset(images, torch.arange(6) % 2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (spoiled(float("nan")), r"image 3 has NaN or infinite pixels; clean the data first"),
        (spoiled(-1.5), r"image 3 ranges from -1\.5 to 0, outside \[0, 1\]; leave normalisation"),
        (Endless(), r"Endless has no length or positions; a map-style Dataset"),
        (TensorDataset(torch.zeros(0, 1, 2, 2)), r"TensorDataset is empty"),
        (TensorDataset(torch.zeros(4, 1, 2, 2)), r"item 0 of TensorDataset is a tuple; it must be \(image, label\)"),
        (TensorDataset(torch.zeros(4, 2, 2), torch.arange(4) % 2), r"image 0 has the shape \[2, 2\]"),
        (
            DataLoader(tensors(), sampler=WeightedRandomSampler([1.0] * 20, 20)),
            r"a DataLoader with a sampler, batch_sampler or collate_fn of its own cannot be used",
        ),
        (
            DataLoader(tensors(), batch_sampler=BatchSampler(RandomSampler(range(3)), 2, drop_last=False)),
            r"a DataLoader with a sampler, batch_sampler or collate_fn of its own cannot be used",
        ),
        (
            DataLoader(tensors(), sampler=RandomSampler(tensors(), replacement=True, num_samples=3)),
            r"a DataLoader with a sampler, batch_sampler or collate_fn of its own cannot be used",
        ),
        (labelled(0.7), r"the label of item 0 is 0\.7; it must be one integer"),
        (labelled("cat"), r"the label of item 0 is 'cat'; it must be one integer"),
        (labelled(torch.eye(2)[0]), r"the label of item 0 is tensor.*; it must be one integer"),
    ],
)
def test_what_cannot_be_used_is_one_line(train: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_torch(train, tensors(4), validation=1)


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(InputError, match="unknown storage 'streaming'; did you mean 'streamed'"):
        from_torch(tensors(), tensors(4), storage="streaming")  # type: ignore[arg-type]


def test_16_bit_pictures_are_scaled_not_clipped() -> None:
    deep = [(Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)), number % 2) for number in range(4)]
    splits = from_torch(deep, deep, validation=1)  # type: ignore[arg-type]
    assert levels(splits.test) == [0x80] * 4


def test_a_label_outside_the_given_classes_is_named() -> None:
    with pytest.raises(InputError, match=r"label 1 in row 1 is outside 0\.\.0"):
        from_torch(tensors(), tensors(4), validation=1, classes=("only",))
