"""``folder:PATH``: image files in a folder for each class, with or without a test set of their own."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from toughen import rng
from toughen.data.decode import Encoded, decode
from toughen.data.image_set import ImageSet
from toughen.data.settings import DATASETS, DataSettings, Source
from toughen.errors import InputError

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"}
_TEST_NAMES = ("test", "val", "valid", "validation")


class _Files(NamedTuple):
    """Image files with the labels of their class folders."""

    paths: list[Path]
    labels: list[int]


def read_folder(settings: DataSettings) -> tuple[ImageSet, ImageSet]:
    """Read ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*``, or ``PATH/CLASS/*``.

    The test folder may also be called ``val``, ``valid`` or ``validation``. Without ``train``, a fifth of
    each class (at least one image) is held out as the test set, the same for every seed. Test rows are
    shuffled, so that the first few hold all classes.

    Raises:
        InputError: A folder or file that is missing, empty or cannot be decoded; fewer than two
            classes; classes that differ between train and test.
    """
    assert settings.path is not None  # the settings saw to it
    root = Path(settings.path).expanduser()
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist, or is not a folder")
    classes, train, test = _with_test_folder(root) if _has_train_folder(root) else _held_out(root)

    paths = train.paths + test.paths
    # Decoded together: one grey-or-colour decision, and one size, for both.
    images = decode([Encoded(str(path), path) for path in paths], image_size=settings.image_size)
    both = ImageSet(images, torch.tensor(train.labels + test.labels), classes)
    shuffled = torch.randperm(len(test.paths), generator=rng.generator(0, "split", len(classes)))
    return both.subset(slice(len(train.paths))), both.subset(len(train.paths) + shuffled)


def _has_train_folder(root: Path) -> bool:
    train = root / "train"
    return train.is_dir() and bool(_folders(train))  # without folders inside, it is a class of trains


def _with_test_folder(root: Path) -> tuple[tuple[str, ...], _Files, _Files]:
    test_root = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test_root is None:
        raise InputError(f"{root} has a folder 'train' but none called {', '.join(_TEST_NAMES)}")
    train, test = _classes(root / "train"), _classes(test_root)
    if train.keys() != test.keys():
        name = min(train.keys() ^ test.keys())
        has, lacks = (root / "train", test_root) if name in train else (test_root, root / "train")
        raise InputError(f"classes differ: {has} has the class {name!r}, {lacks} has not")
    return tuple(train), _labelled(train.values()), _labelled(test.values())


def _held_out(root: Path) -> tuple[tuple[str, ...], _Files, _Files]:
    train: list[list[Path]] = []
    test: list[list[Path]] = []
    classes = _classes(root)
    for label, (name, paths) in enumerate(classes.items()):
        if len(paths) < 2:
            raise InputError(f"class folder {root / name} has 1 image; at least 2 are needed to hold one out")
        order = torch.randperm(len(paths), generator=rng.generator(0, "split", label))
        num_test = max(1, len(paths) // 5)
        test.append(_at(paths, order[:num_test]))
        train.append(_at(paths, order[num_test:]))
    return tuple(classes), _labelled(train), _labelled(test)


def _classes(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, classes and files in the order of their names."""
    classes = {folder.name: _image_files(folder) for folder in _folders(root)}
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise InputError(f"{root} needs a folder for each of at least 2 classes; found: {found}")
    return classes


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise InputError(f"class folder {folder} has no images ({', '.join(sorted(_SUFFIXES))})")
    return paths


def _labelled(classes: Iterable[list[Path]]) -> _Files:
    rows = [(path, label) for label, paths in enumerate(classes) for path in paths]
    return _Files([path for path, _ in rows], [label for _, label in rows])


def _at(paths: list[Path], positions: Tensor) -> list[Path]:
    return [paths[position] for position in positions.tolist()]


DATASETS.register("folder")(Source(read_folder, path="required"))
