"""What the user says about data, checked when it is said; and the sources that the names stand for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from toughen.data.image_set import ImageSet
from toughen.errors import InputError, unknown
from toughen.registry import Registry

Augment = Literal["none", "crop", "crop_flip"]


class Rows(Protocol):
    """Rows that are counted first and taken later: an ``ImageSet``, or images yet to be decoded."""

    def __len__(self) -> int: ...

    def subset(self, index: Tensor | slice) -> ImageSet:
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Args:
        read: Reads the training rows and the test rows, all of one image size and number of channels.
        path: Whether the source takes a path.
    """

    read: Callable[["DataSettings"], tuple[Rows, Rows]]
    path: Literal["none", "optional", "required"]


DATASETS: Registry[Source] = Registry("data set")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images to use, how to split them and how to vary them.

    Args:
        name: A key of ``DATASETS``, or ``NAME:PATH``, which is taken apart into ``name`` and ``path``.
        path: File tree of the source: required by ``folder`` and ``parquet``, optional for ``cifar10``
            (a folder with its parquet files; without it they are downloaded).
        validation: Training rows set aside for choosing checkpoints, at least 1.
        train_samples: Rows to train on, of those left; None is all of them.
        test_samples: First rows of the test set to keep; None is all of them.
        image_size: Pixels of a side to which all images are resized; None leaves them as they are.
        augment: Random variation of training images: zero-padded shifts, also mirrored, or none.
        pad: Largest shift, in pixels.
        split_seed: Seed of the split into training and validation rows. The test set depends on no seed.

    Raises:
        InputError: Unknown name, a path missing or too much, or a number outside its range.
    """

    name: str = "digits"
    path: str | None = None
    validation: int = 1000
    train_samples: int | None = None
    test_samples: int | None = None
    image_size: int | None = None
    augment: Augment = "crop_flip"
    pad: int = 4
    split_seed: int = 0

    def __post_init__(self) -> None:
        self._take_name_apart()
        self._check_path()
        if self.augment not in get_args(Augment):
            raise unknown("data.augment", self.augment, get_args(Augment))
        for key in ("validation", "train_samples", "test_samples", "image_size"):
            self._check_at_least(key, 1)
        for key in ("pad", "split_seed"):
            self._check_at_least(key, 0)

    def _take_name_apart(self) -> None:
        name, colon, path = self.name.partition(":")
        if not colon:
            return
        if self.path is not None:
            raise InputError(f"data.name {self.name!r} holds a path and data.path is {self.path!r}; give one")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "path", path)

    def _check_path(self) -> None:
        takes = DATASETS[self.name].path
        if takes == "none" and self.path is not None:
            raise InputError(f"data set {self.name!r} takes no path; data.path is {self.path!r}")
        if self.path == "" or (takes == "required" and self.path is None):
            raise InputError(f"data set {self.name!r} needs a path: {self.name}:PATH, or data.path=PATH")

    def _check_at_least(self, key: str, smallest: int) -> None:
        value = getattr(self, key)
        if value is not None and value < smallest:
            raise InputError(f"data.{key} is {value}; it must be at least {smallest}")


def parse_spec(spec: str) -> DataSettings:
    """Turn ``NAME`` or ``NAME:PATH`` into settings with every other value at its default.

    Raises:
        InputError: As for ``DataSettings``.

    Example:
        >>> parse_spec("folder:flowers").path
        'flowers'
    """
    return DataSettings(name=spec)
