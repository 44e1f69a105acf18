"""``cifar10`` and ``cifar100``: downloaded, or from a local copy in any of its usual forms but the pickled one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from toughen.data.class_folders import read_class_folders
from toughen.data.hub import fetch
from toughen.data.image_set import ImageSet, check_labels
from toughen.data.parquet import check_counts, check_order, data_folder, local_parts, mixed, read_tables
from toughen.data.settings import DATASETS, DataSettings, Rows, Source
from toughen.errors import InputError

_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_FINE.split())
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SHAPE = (3, 32, 32)  # a record of the binary version ends with the red, the green and the blue plane
_COUNTS = (50_000, 10_000)


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets, and its local forms.

    Args:
        name: Its key.
        repository: Its card on the hub.
        classes: In the order of the labels.
        label_bytes: Bytes before the pixels of a binary record; the last one is the label.
        train_files: Of the binary version.
        test_file: Of the binary version.
        names_file: Of the binary version: the names of the classes, one a line.
        binary_folder: What the archive of the binary version unpacks to.
        pickled: Files and folders that tell the pickled version.
    """

    name: str
    repository: str
    classes: tuple[str, ...]
    label_bytes: int
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    binary_folder: str
    pickled: tuple[str, ...]

    def read(self, settings: DataSettings) -> tuple[Rows, Rows]:
        """Read 50,000 training and 10,000 test images of 32x32 pixels; a local copy may have fewer.

        Raises:
            InputError: The download failed; the local copy is of no known form, broken, or has other classes.
        """
        if settings.path is None:
            files = fetch(self.repository, local=f"{self.name}:FOLDER")
            rows: tuple[Rows, Rows] = read_tables(*files, classes=self.classes)
        else:
            rows = self._read_local(data_folder(settings.path))
        check_counts(rows, _COUNTS, name=self.name, exactly=settings.path is None)
        return rows

    def _read_local(self, root: Path) -> tuple[Rows, Rows]:
        if files := local_parts(root):
            return read_tables(*files, classes=self.classes)
        for folder in (root, root / self.binary_folder):
            if (folder / self.train_files[0]).exists() or (folder / self.test_file).exists():
                return self._read_binary(folder)
        if (root / "train").is_dir():
            return read_class_folders(root, ("train", "test"), folders=self.classes, classes=self.classes)
        usable = (
            f"train-*.parquet and test-*.parquet, {self.train_files[0]} ... {self.test_file} (the binary version), or"
            " train/CLASS and test/CLASS with images"
        )
        if any((root / name).exists() for name in self.pickled):
            raise InputError(
                f"{root} holds the python version of {self.name}: pickles, which can run code when they are read;"
                f" use {usable}"
            )
        raise InputError(f"no {self.name} found in {root}; it must hold {usable}")

    def _read_binary(self, folder: Path) -> tuple[ImageSet, ImageSet]:
        names = folder / self.names_file
        if names.exists():
            check_order(names.read_text(encoding="utf-8", errors="replace").split(), self.classes, where=str(names))
        train = [self._read_records(folder / file) for file in self.train_files]
        test = self._read_records(folder / self.test_file)
        return (
            ImageSet(torch.cat([t.images for t in train]), torch.cat([t.labels for t in train]), self.classes),
            mixed(test),
        )

    def _read_records(self, file: Path) -> ImageSet:
        if not file.exists():
            raise InputError(f"{file} is missing; unpack the archive of the binary version again")
        content = np.fromfile(file, np.uint8)
        size = self.label_bytes + int(np.prod(_SHAPE))
        if len(content) == 0 or len(content) % size:
            raise InputError(
                f"{file} has {len(content)} bytes, which is not a number of records of {size}; it is cut off, or not"
                f" {self.name}: get it again"
            )
        records = torch.from_numpy(content.reshape(-1, size))
        labels = records[:, self.label_bytes - 1].to(torch.int64)
        try:
            check_labels(labels, self.classes)
        except InputError as error:
            raise InputError(f"{file}: {error}; it is not {self.name}") from error
        return ImageSet(records[:, self.label_bytes :].reshape(-1, *_SHAPE), labels, self.classes)


CIFAR10 = Cifar(
    name="cifar10",
    repository="uoft-cs/cifar10",
    classes=CIFAR10_CLASSES,
    label_bytes=1,
    train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test_file="test_batch.bin",
    names_file="batches.meta.txt",
    binary_folder="cifar-10-batches-bin",
    pickled=("data_batch_1", "test_batch", "cifar-10-batches-py"),
)
CIFAR100 = Cifar(
    name="cifar100",
    repository="uoft-cs/cifar100",
    classes=CIFAR100_CLASSES,
    label_bytes=2,  # the coarse label, then the fine one
    train_files=("train.bin",),
    test_file="test.bin",
    names_file="fine_label_names.txt",
    binary_folder="cifar-100-binary",
    pickled=("train", "meta", "cifar-100-python"),
)
DATASETS.register("cifar10")(Source(CIFAR10.read, path="optional"))
DATASETS.register("cifar100")(Source(CIFAR100.read, path="optional"))
