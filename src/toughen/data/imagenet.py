"""``imagenet`` and the ten-class ``imagenette``: downloaded, or from a local copy as folders or parquet files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from toughen.data.class_folders import read_class_folders
from toughen.data.encoded import EncodedRows
from toughen.data.hub import fetch
from toughen.data.parquet import check_counts, data_folder, local_parts, read_tables
from toughen.data.settings import DATASETS, DataSettings, Source
from toughen.errors import InputError

IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_TESTS = ("validation", "valid", "val")  # the labels of ImageNet's own test part are not public


def imagenet_classes() -> dict[str, str]:
    """Return the names of the 1,000 classes by WordNet id, in the order of the labels."""
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

    info = ImageNetInfo("imagenet-1k")
    return {str(info.index_to_label_name(label)): str(info.index_to_description(label)) for label in range(1000)}


@dataclass(frozen=True)
class ImageNet:
    """ImageNet or a part of it.

    Args:
        name: Its key.
        repository: Its card on the hub.
        config: The folder of the card's parquet files, where there are several.
        folder: What its archive unpacks to, if that is one folder.
        counts: Training images and validation images.
        classes: Returns the names of the classes by WordNet id.
    """

    name: str
    repository: str
    config: str | None
    folder: str
    counts: tuple[int, int]
    classes: Callable[[], Mapping[str, str]]

    def read(self, settings: DataSettings) -> tuple[EncodedRows, EncodedRows]:
        """Read the training images, and the validation images as the test part; a local copy may have fewer.

        Raises:
            InputError: The download failed; the local copy is of no known form, broken, or has other classes.
        """
        classes = self.classes()
        if settings.path is None:
            files = fetch(self.repository, local=f"{self.name}:FOLDER", config=self.config, tests=_TESTS)
            rows = _tables(files, classes)
        else:
            rows = self._read_local(data_folder(settings.path), classes)
        check_counts(rows, self.counts, name=self.name, exactly=settings.path is None)
        return rows

    def _read_local(self, root: Path, classes: Mapping[str, str]) -> tuple[EncodedRows, EncodedRows]:
        root = root / self.folder if (root / self.folder).is_dir() else root
        if (root / "train").is_dir() and not any((root / "train").glob("*.parquet")):
            return read_class_folders(root, ("train", "val"), folders=list(classes), classes=list(classes.values()))
        if files := local_parts(root, _TESTS):
            return _tables(files, classes)
        raise InputError(
            f"no {self.name} found in {root}; it must hold train/{next(iter(classes))} ... and val/... with images, or"
            " train-*.parquet and validation-*.parquet"
        )


def _tables(files: tuple[list[Path], list[Path]], classes: Mapping[str, str]) -> tuple[EncodedRows, EncodedRows]:
    return read_tables(*files, classes=list(classes.values()), synonyms=list(classes))


def _imagenette(name: str, config: str, folder: str) -> ImageNet:
    return ImageNet(name, "frgfm/imagenette", config, folder, (9_469, 3_925), lambda: IMAGENETTE_CLASSES)


IMAGENETS = (
    ImageNet("imagenet", "ILSVRC/imagenet-1k", None, "", (1_281_167, 50_000), imagenet_classes),
    _imagenette("imagenette", "full_size", "imagenette2"),
    _imagenette("imagenette320", "320px", "imagenette2-320"),
    _imagenette("imagenette160", "160px", "imagenette2-160"),
)
for _source in IMAGENETS:
    DATASETS.register(_source.name)(Source(_source.read, path="optional"))
