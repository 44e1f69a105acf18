"""Images of the user's own: any map-style ``torch.utils.data.Dataset``, or a ``DataLoader`` over one."""

import random
from dataclasses import dataclass
from operator import index
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.dataloader import default_collate, default_convert

from toughen import rng
from toughen.data.augment import ResizedCrop
from toughen.data.decode import Pixels, eight_bits
from toughen.data.image_set import DataSplits, Images, ImageSet, check_labels
from toughen.data.mapped import fits_memory
from toughen.data.settings import Storage
from toughen.data.splits import stratified_order
from toughen.data.stream import StreamedSet
from toughen.errors import InputError, unknown

TorchImages = Dataset[Any] | DataLoader[Any]
_USUAL_COLLATES = (default_collate, default_convert)
_LOOKS = 32  # images that are read twice to see whether a data set varies them: a coin per image hides from 2^-32


@dataclass(frozen=True)
class DatasetReader:
    """Reads items ``(image, label)`` of a data set.

    Args:
        dataset: An image is a PIL image, a uint8 tensor [C, H, W], a float one in [0, 1] (rounded to the 256 levels),
            or a uint8 array [H, W, C] or [H, W].
    """

    dataset: Any
    threads: int | None = 1  # a data set of somebody else's may hold an open file

    def read(self, row: int) -> Pixels:
        """See ``Reader.read``; what the data set draws at random depends on the row alone."""
        return self.read_for_training(row, None, rng.stream_seed(0, "decode", row))

    def read_for_training(self, row: int, crop: ResizedCrop | None, seed: int) -> Pixels:
        """See ``Reader.read_for_training``: what the data set draws at random is fixed by ``seed``."""
        assert crop is None  # the loader saw to it
        return _pixels(_item(self.dataset, row, seed)[0], row)


def from_torch(
    train: TorchImages,
    test: TorchImages,
    *,
    validation: TorchImages | int = 1000,
    classes: tuple[str, ...] | None = None,
    name: str = "data",
    storage: Storage = "auto",
    split_seed: int = 0,
) -> DataSplits:
    """Take images from data sets of your own, for ``Trainer(recipe, data=...)``.

    Images that the data set varies at random are read anew in each epoch, from worker processes, and the random
    numbers of torch, numpy and ``random`` are set for each image, so that a run can be repeated and resumed.

    Args:
        train: Items ``(image, label)``: see ``DatasetReader`` for what an image may be. Of a ``DataLoader`` the data
            set is used; its batches, order and workers are not.
        test: As ``train``.
        validation: As ``train``; or how many training images to hold out, classes in their shares.
        classes: Names in the order of the labels; None takes the data set's ``classes``, or the numbers.
        name: For tables and messages.
        storage: ``"resident"`` reads everything once; ``"auto"`` does so unless reading an image twice gives
            two different ones, or all of them take more than a quarter of the memory.
        split_seed: Of the held-out images.

    Raises:
        InputError: The data set has no length, an item has another form, or an image has NaN or is out of range.
    """
    if storage not in get_args(Storage):
        raise unknown("storage", str(storage), get_args(Storage))
    sources = {"train": _dataset(train), "test": _dataset(test)}
    if not isinstance(validation, int):
        sources["validation"] = _dataset(validation)
    labels = {part: _labels(dataset) for part, dataset in sources.items()}
    names = classes or tuple(getattr(sources["train"], "classes", ()))
    names = tuple(map(str, names)) or tuple(str(c) for c in range(max(int(y.max()) for y in labels.values()) + 1))
    if missing := set(range(len(names))) - set(labels["train"].tolist()):
        raise InputError(
            f"no training image of the class {names[min(missing)]!r} (label {min(missing)}); labels count from 0"
        )
    varies = {part: _varies(DatasetReader(dataset), len(dataset)) for part, dataset in sources.items()}
    for part in ("test", "validation"):
        if varies.get(part):
            raise InputError(f"the {part} images vary at random when they are read again; leave random transforms out")
    sets: dict[str, Images] = {
        part: _images(dataset, labels[part], names, storage, varies=varies[part]) for part, dataset in sources.items()
    }
    if isinstance(validation, int):
        whole = sets["train"]
        if not 1 <= validation < len(whole):
            raise InputError(f"validation is {validation}; with {len(whole)} images it must be 1..{len(whole) - 1}")
        order = stratified_order(whole.labels, rng.generator(split_seed, "split"))
        sets["validation"], sets["train"] = whole.subset(order[:validation]), whole.subset(order[validation:])
    how = "read anew in each epoch" if isinstance(sets["train"], StreamedSet) else "kept in memory as uint8"
    notes = [f"training images are {how}"]
    if isinstance(validation, int) and varies["train"]:
        notes.append("validation images are held out of a data set that varies them; better give validation apart")
    return DataSplits(name, sets["train"], sets["validation"], sets["test"], notes=tuple(notes))


def _dataset(given: TorchImages) -> Any:
    dataset = given
    if isinstance(given, DataLoader):
        dataset = given.dataset
        if not _is_plain(given):
            raise InputError(
                "a DataLoader with a sampler, batch_sampler or collate_fn of its own cannot be used: toughen draws the"
                " order itself, so that runs can resume; pass the data set"
            )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"{type(dataset).__name__} has no length or positions;"
            " a map-style Dataset (__len__ and __getitem__) is needed"
        )
    if not len(dataset):
        raise InputError(f"{type(dataset).__name__} is empty")
    return dataset


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether a loader serves each image of its data set once, in batches as torch makes them."""
    sampler = loader.sampler
    once = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    batches = loader.batch_sampler
    plain = batches is None or (type(batches) is BatchSampler and batches.sampler is sampler)
    return once and plain and loader.collate_fn in _USUAL_COLLATES and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]


def _labels(dataset: Any) -> Tensor:
    """Return the labels [N]: torchvision's attribute ``targets`` where it tells the truth, or every item's."""
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset)[torch.as_tensor(dataset.indices)]
    targets = getattr(dataset, "targets", ())
    looks = range(min(_LOOKS, len(dataset)))
    # an item's label may be another than its target: target_transform, or a subclass that relabels
    if len(targets) == len(dataset) and getattr(dataset, "target_transform", None) is None:
        try:
            if all(index(targets[row]) == _label(dataset, row) for row in looks):
                return torch.tensor([index(target) for target in targets])
        except TypeError:  # names, for example
            pass
    return torch.tensor([_label(dataset, row) for row in range(len(dataset))])


def _label(dataset: Any, row: int) -> int:
    label = _item(dataset, row, seed=0)[1]
    try:
        return index(label)
    except TypeError:
        raise InputError(f"the label of item {row} is {label!r}; it must be one integer") from None


def _item(dataset: Any, row: int, seed: int) -> tuple[Any, Any]:
    """Read an item; what it draws at random is fixed by ``seed``, and nobody else's numbers move."""
    with torch.random.fork_rng(devices=[]), _Seeded(seed):
        item = dataset[row]
    if not isinstance(item, tuple | list) or len(item) != 2:
        given = f"item {row} of {type(dataset).__name__} is a {type(item).__name__}"
        raise InputError(f"{given}; it must be (image, label)")
    return item[0], item[1]


def _images(dataset: Any, labels: Tensor, classes: tuple[str, ...], storage: Storage, *, varies: bool) -> Images:
    check_labels(labels, classes)
    reader = DatasetReader(dataset)
    height, width, channels = reader.read(0).shape
    streamed = StreamedSet(reader, torch.arange(len(labels)), labels, classes, (channels, height, width))
    large = not fits_memory(len(labels) * channels * height * width)
    if storage == "streamed" or (storage == "auto" and (large or varies)):
        return streamed
    return ImageSet(streamed.take(torch.arange(len(labels))).images, labels, classes)


def _varies(reader: DatasetReader, num_images: int) -> bool:
    rows = range(min(_LOOKS, num_images))

    def read(row: int, again: int) -> Pixels:
        return reader.read_for_training(row, None, seed=2 * row + again)

    return any(not np.array_equal(read(row, 0), read(row, 1)) for row in rows)


class _Seeded:
    """Inside, torch, numpy and ``random`` draw from the seed; numpy and ``random`` go on as before afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)

    def __exit__(self, *_: object) -> None:
        random.setstate(self.before[0])
        np.random.set_state(self.before[1])


def _pixels(image: Any, row: int) -> Pixels:
    if isinstance(image, Image.Image):
        image = np.asarray(eight_bits(image, None))
    if isinstance(image, Tensor):
        image = _levels(image, row).permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise InputError(
            f"image {row} is a {type(image).__name__}; it must be a PIL image, a tensor [C, H, W] (uint8, or float in"
            " [0, 1]), or a uint8 array [H, W, C]"
        )
    return image.reshape(*image.shape[:2], -1)


def _levels(image: Tensor, row: int) -> Tensor:
    if image.ndim != 3:
        raise InputError(f"image {row} has the shape {list(image.shape)}; it must be [C, H, W]")
    if image.dtype == torch.uint8:
        return image
    if not bool(torch.isfinite(image).all()):
        raise InputError(f"image {row} has NaN or infinite pixels; clean the data first")
    if float(image.min()) < 0 or float(image.max()) > 1:
        raise InputError(
            f"image {row} ranges from {float(image.min()):.4g} to {float(image.max()):.4g}, outside [0, 1];"
            " leave normalisation (mean, std) out of the data set, since it belongs inside the model"
        )
    return (image * 255).round().to(torch.uint8)
