"""Tiny data sets in the exact layouts in which the public ones come; the red level of an image tells it from others."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
IMAGENETTE_IDS = [
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
]


def encoded(level: int, *, size: int = 4, form: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 0)).save(buffer, format=form)
    return buffer.getvalue()


def as_struct(images: Sequence[bytes | None]) -> Any:
    return pa.array([{"bytes": image, "path": None} for image in images])


def write_parquet(
    file: Path,
    images: Any,
    labels: Any,
    *,
    image: str = "img",
    label: str = "label",
    names: Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a table as the ``datasets`` library does: names of classes in the schema, several row groups."""
    table = pa.table({image: images, label: labels, **(more or {})})
    if names is not None:
        card = {"info": {"features": {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(card)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=2)


def write_levels(file: Path, levels: Sequence[int], labels: Sequence[int], *, size: int = 4, **options: Any) -> None:
    """Write a table of constant images."""
    write_parquet(file, as_struct([encoded(level, size=size) for level in levels]), labels, **options)


def write_card(folder: Path, num_classes: int, *, test: str = "test", shards: int = 1, **options: Any) -> None:
    """Write two training rows and a test row of every class; training levels are rows, test levels count from 200."""
    labels = list(range(num_classes)) * 2
    per_shard = len(labels) // shards
    for shard in range(shards):
        rows = range(shard * per_shard, (shard + 1) * per_shard)
        file = folder / f"train-{shard:05}-of-{shards:05}.parquet"
        write_levels(file, [row % 200 for row in rows], [labels[row] for row in rows], **options)
    backwards = list(reversed(range(num_classes)))
    write_levels(folder / f"{test}-00000-of-00001.parquet", [200 + x % 56 for x in backwards], backwards, **options)


def write_cifar_binary(folder: Path, files: Mapping[str, Sequence[int]], *, coarse: bool = False) -> None:
    """Write records of label bytes and the three planes; red is 10 x the label, green 1, blue the row."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in files.items():
        records = [
            [99] * coarse + [label] + [10 * label % 256] * 1024 + [1] * 1024 + [row] * 1024
            for row, label in enumerate(labels)
        ]
        (folder / name).write_bytes(np.array(records, dtype=np.uint8).tobytes())


def cifar10_binary(folder: Path) -> None:
    """Write the five batches, with two rows each, and the test batch, with ten."""
    batches = {f"data_batch_{number + 1}.bin": [2 * number + 1, 2 * number] for number in range(5)}
    write_cifar_binary(folder, {**batches, "test_batch.bin": list(range(10))})
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")


def write_class_folders(root: Path, names: Sequence[str], *, count: int = 2, suffix: str = ".JPEG") -> None:
    """Write so many images a class; the level is 20 x the class + the number of the image."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            form = "png" if suffix == ".png" else "jpeg"
            (root / name / f"{name}_{number}{suffix}").write_bytes(encoded((20 * label + number) % 256, form=form))


def imagenette_folders(root: Path) -> None:
    """Write fast.ai's tree."""
    write_class_folders(root / "train", IMAGENETTE_IDS)
    write_class_folders(root / "val", IMAGENETTE_IDS, count=1)
    (root / "noisy_imagenette.csv").write_text("path\n")


def edm_npz(file: Path, labels: Sequence[int], *, size: int = 4, start: int = 0, compressed: bool = False) -> None:
    """Write generated images as Wang et al. (2023) publish them; the red level is ``start`` + the row."""
    images = np.zeros((len(labels), size, size, 3), np.uint8)
    images[..., 0] = np.arange(start, start + len(labels))[:, None, None]
    save = np.savez_compressed if compressed else np.savez
    save(file, image=images, label=np.array(labels))


def hub_cache(cache: Path, repository: str, files: Path, *, revision: str = "main", commit: str = "c" * 40) -> None:
    """Put a folder of files into a cache as huggingface_hub keeps it: references, blobs, and links by commit."""
    root = cache / f"datasets--{repository.replace('/', '--')}"
    reference = root / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(path for path in files.rglob("*") if path.is_file())):
        blob = root / "blobs" / f"{commit[:8]}{number:056x}"
        blob.write_bytes(file.read_bytes())
        link = root / "snapshots" / commit / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
