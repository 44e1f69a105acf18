"""What the user says about data, checked when it is said; and the sources that the names stand for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from toughen.data.augment import AUGMENTS, Augmentation, CropFlip, ResizedCrop
from toughen.data.decode import OnError
from toughen.data.encoded import EncodedRows
from toughen.data.image_set import ImageSet
from toughen.errors import InputError, check_choices
from toughen.registry import Registry

Rows = ImageSet | EncodedRows  # in memory, or yet to be decoded
Storage = Literal["auto", "resident", "streamed"]

_MOST_WORKERS = 16  # unless asked for: a container on a large host is told of cores that it may not use


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Args:
        read: Reads the training rows and the test rows.
        path: Whether the source takes a path.
        remote: Whether the path names a data set on a hub rather than a place on this machine.
    """

    read: Callable[["DataSettings"], tuple[Rows, Rows]]
    path: Literal["none", "optional", "required"]
    remote: bool = False


DATASETS: Registry[Source] = Registry("data set")


@dataclass(frozen=True, kw_only=True)
class ExtraSettings:
    """Further training images, generated or pseudo-labelled.

    Args:
        path: A ``.npz`` file with ``image`` and ``label``, a parquet file, or a folder of either.
        fraction: Share of every training batch that they fill, in (0, 1).

    Raises:
        InputError: The fraction is outside its range.
    """

    path: str
    fraction: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"data.extra.fraction is {self.fraction}; it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images to use, how to split them, keep them and vary them.

    Args:
        name: A key of ``DATASETS``, or ``NAME:PATH``, which is taken apart into ``name`` and ``path``.
        path: File tree of the source: required by ``folder`` and ``parquet``, optional for the public data sets
            (a local copy; without it they are downloaded).
        validation: Training rows set aside for choosing checkpoints, at least 1; classes keep their shares.
        train_samples: Rows to train on, of those left; None is all of them. Classes keep their shares.
        test_samples: First rows of the test set to keep; None is all of them.
        image_size: Pixels of a side to which all images are brought; None leaves them as they are.
        center: Share of the shorter side that is kept when images are brought to a size, of a square in the
            middle, in (0, 1]. ImageNet's custom is 0.875.
        channels: 1 or 3; None is 1 if all images are grey and 3 otherwise.
        augment: What varies the training images, in order: names of ``AUGMENTS`` or augmentations.
        split_seed: Seed of the split into training and validation rows. The test set depends on no seed.
        storage: ``"resident"`` decodes everything once and keeps it as uint8 on the device; ``"streamed"`` decodes
            when an image is needed; ``"auto"`` is resident if the images fit.
        resident_share: Share of the memory that resident images may take, of the device and of the host.
        workers: Processes that decode streamed training images; None is one per spare core, at most 16.
        on_error: ``"skip"`` leaves out images that cannot be decoded, and counts them.
        extra: Further training images to mix into every batch.

    Raises:
        InputError: Unknown name, a path missing or too much, or a number outside its range.
    """

    name: str = "digits"
    path: str | None = None
    validation: int = 1000
    train_samples: int | None = None
    test_samples: int | None = None
    image_size: int | None = None
    center: float = 1.0
    channels: int | None = None
    augment: tuple[str | Augmentation, ...] = (CropFlip(),)
    split_seed: int = 0
    storage: Storage = "auto"
    resident_share: float = 0.25
    workers: int | None = None
    on_error: OnError = "raise"
    extra: ExtraSettings | None = None

    def __post_init__(self) -> None:
        self._take_name_apart()
        self._check_path()
        check_choices(self, where="data")
        object.__setattr__(self, "augment", tuple(AUGMENTS[a]() if isinstance(a, str) else a for a in self.augment))
        for member in self.augment:
            if isinstance(member, type) or not isinstance(member, Augmentation):
                raise InputError(
                    f"data.augment holds {member!r}; it must be a name or an augmentation: {', '.join(AUGMENTS)}"
                )
        if any(isinstance(member, ResizedCrop) for member in self.augment[1:]):
            raise InputError("data.augment: resized_crop must come first, since it is taken from the original picture")
        for key in ("validation", "train_samples", "test_samples", "image_size"):
            self._check_at_least(key, 1)
        for key in ("split_seed", "workers"):
            self._check_at_least(key, 0)
        if self.channels not in (None, 1, 3):
            raise InputError(f"data.channels is {self.channels}; it must be 1 or 3")
        for key in ("center", "resident_share"):
            if not 0 < getattr(self, key) <= 1:
                raise InputError(f"data.{key} is {getattr(self, key)}; it must be above 0 and at most 1")
        if self.center < 1 and self.image_size is None:
            raise InputError(f"data.center is {self.center}; it has a meaning only with data.image_size")

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """The augmentations, in order."""
        return tuple(member for member in self.augment if not isinstance(member, str))

    @property
    def num_workers(self) -> int:
        """Processes that decode streamed training images."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(max(1, cores - 1), _MOST_WORKERS)

    def anchored(self) -> "DataSettings":
        """Return the same settings with absolute paths, so that they mean the same from another folder."""
        local = self.path is not None and not DATASETS[self.name].remote
        path = str(Path(self.path).expanduser().absolute()) if local and self.path is not None else self.path
        extra = self.extra
        if extra is not None:
            extra = replace(extra, path=str(Path(extra.path).expanduser().absolute()))
        return replace(self, path=path, extra=extra)

    def _take_name_apart(self) -> None:
        name, colon, path = self.name.partition(":")
        if not colon:
            return
        if self.path is not None:
            raise InputError(f"data.name {self.name!r} holds a path and data.path is {self.path!r}; give one")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "path", path)

    def _check_path(self) -> None:
        if self.name not in DATASETS and Path(self.name).is_dir():
            raise InputError(f"data set {self.name!r} is a folder; as images of your own it is folder:{self.name}")
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
