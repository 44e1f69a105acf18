"""Image files in a folder per class, where the classes and their order are known beforehand."""

from collections.abc import Sequence
from pathlib import Path

import torch

from toughen import rng
from toughen.data.encoded import EncodedRows, Files
from toughen.data.folder import SUFFIXES, image_files
from toughen.errors import InputError


def read_class_folders(
    root: Path, parts: tuple[str, str], *, folders: Sequence[str], classes: Sequence[str]
) -> tuple[EncodedRows, EncodedRows]:
    """Read ``ROOT/PART/FOLDER/*`` for the training part and the test part; test rows in a fixed random order.

    Args:
        root: What holds the parts.
        parts: Names of the folders of the training images and of the test images.
        folders: Names of the class folders, in the order of the labels.
        classes: Names of the classes, in that order.

    Raises:
        InputError: A part or a class folder is missing or empty, or there are other folders.
    """
    train, test = (_read_part(root, part, folders, classes) for part in parts)
    return train, test.subset(torch.randperm(len(test), generator=rng.generator(0, "split", 0)))


def _read_part(root: Path, part: str, folders: Sequence[str], classes: Sequence[str]) -> EncodedRows:
    place = root / part
    if not place.is_dir():
        raise InputError(f"the data folder {root} has no folder {part!r}")
    entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
    found = {entry.name for entry in entries if entry.is_dir()}
    if not found and any(entry.suffix.lower() in SUFFIXES for entry in entries):
        raise InputError(f"{place} holds images but no class folders; sort them into {folders[0]}, {folders[1]}, ...")
    if missing := [name for name in folders if name not in found]:
        raise InputError(
            f"{place} has no folder for {len(missing)} of {len(folders)} classes; the first is {missing[0]}"
            f" ({classes[folders.index(missing[0])]})"
        )
    if strange := sorted(found.difference(folders)):
        raise InputError(f"{place} has the folder {strange[0]}, which is none of the {len(folders)} classes; remove it")
    files = [image_files(root, place / name) for name in folders]
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    names = [name for of_class in files for name in of_class]
    return EncodedRows(Files(root, names), torch.tensor(labels), tuple(classes))
