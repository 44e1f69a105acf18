"""``folder:PATH``: image files in a folder for each class, with or without a test set of their own."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from toughen import rng
from toughen.data.encoded import EncodedRows, Files
from toughen.data.settings import DATASETS, DataSettings, Source
from toughen.errors import InputError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"}
_TEST_NAMES = ("test", "val", "valid", "validation")


def read_folder(settings: DataSettings) -> tuple[EncodedRows, EncodedRows]:
    """Read ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*``, or ``PATH/CLASS/*``.

    The test folder may also be called ``val``, ``valid`` or ``validation``. Without ``train``, a fifth of
    each class (at least one image) is held out as the test set, the same for every seed. Test rows are
    shuffled, so that the first few hold all classes.

    Raises:
        InputError: A folder that is missing or empty; fewer than two classes; classes that differ between
            train and test.
    """
    assert settings.path is not None  # the settings saw to it
    root = Path(settings.path).expanduser()
    if not root.is_dir():
        raise InputError(
            f"data folder {root} does not exist, or is not a folder; name another: data.path=FOLDER, or folder:FOLDER"
        )
    classes, train, test = _with_test_folder(root) if _has_train_folder(root) else _held_out(root)
    shuffled = torch.randperm(sum(map(len, test)), generator=rng.generator(0, "split", len(classes)))
    return _rows(root, train, classes), _rows(root, test, classes).subset(shuffled)


def _has_train_folder(root: Path) -> bool:
    train = root / "train"
    return train.is_dir() and bool(_folders(train))  # without folders inside, it is a class of trains


def _with_test_folder(root: Path) -> tuple[tuple[str, ...], list[list[str]], list[list[str]]]:
    """Return the class names, and the training and the test files of each, relative to ``root``."""
    test_root = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test_root is None:
        raise InputError(f"{root} has a folder 'train' but none called {', '.join(_TEST_NAMES)}")
    train, test = _classes(root, root / "train"), _classes(root, test_root)
    if train.keys() != test.keys():
        name = min(train.keys() ^ test.keys())
        has, lacks = (root / "train", test_root) if name in train else (test_root, root / "train")
        raise InputError(f"classes differ: {has} has the class {name!r}, {lacks} has not")
    return tuple(train), list(train.values()), list(test.values())


def _held_out(root: Path) -> tuple[tuple[str, ...], list[list[str]], list[list[str]]]:
    """As ``_with_test_folder``, with a fifth of each class as its test files."""
    train: list[list[str]] = []
    test: list[list[str]] = []
    classes = _classes(root, root)
    for label, (name, files) in enumerate(classes.items()):
        if len(files) < 2:
            raise InputError(f"class folder {root / name} has 1 image; at least 2 are needed to hold one out")
        order = torch.randperm(len(files), generator=rng.generator(0, "split", label)).tolist()
        num_test = max(1, len(files) // 5)
        test.append([files[position] for position in order[:num_test]])
        train.append([files[position] for position in order[num_test:]])
    return tuple(classes), train, test


def _classes(root: Path, part: Path) -> dict[str, list[str]]:
    """Return the image files of each class below ``part``, classes and files in the order of their names."""
    classes = {folder.name: image_files(root, folder) for folder in _folders(part)}
    if len(classes) < 2:
        found = ", ".join(classes) or "none; if it is the folder of one class, give the one above it"
        raise InputError(f"{part} needs a folder for each of at least 2 classes; found: {found}")
    return classes


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, folder: Path) -> list[str]:
    """Return the image files in a folder below ``root``, relative to it and sorted.

    Raises:
        InputError: There are none.
    """
    found = (name for name in os.listdir(folder) if not name.startswith("."))  # macOS leaves ._NAME beside NAME
    names = sorted(name for name in found if os.path.splitext(name)[1].lower() in SUFFIXES)
    if broken := [name for name in names if not name.isascii() and not _is_text(name)]:
        raise InputError(f"file name {os.fsencode(broken[0])!r} in {folder} is not valid UTF-8; rename it")
    if not names:
        raise InputError(f"class folder {folder} has no images ({', '.join(sorted(SUFFIXES))}); fill or remove it")
    within = folder.relative_to(root)
    return [str(within / name) for name in names]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(root: Path, files: Sequence[Sequence[str]], classes: tuple[str, ...]) -> EncodedRows:
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    return EncodedRows(Files(root, [name for of_class in files for name in of_class]), torch.tensor(labels), classes)


DATASETS.register("folder")(Source(read_folder, path="required"))
