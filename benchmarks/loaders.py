"""Images per second of the training loaders, next to torchvision's usual DataLoader: same images, same augmentation.

    python benchmarks/loaders.py ../shared/data/cifar10 --json results/loaders.json

Each kind serves whole passes over the images in turn, several rounds in one process, so that a change of the
machine's speed meets all of them; the medians and their ratios are reported.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from toughen import data
from toughen.data import DataSettings, DataSplits
from toughen.data.augment import CropFlip
from toughen.data.encoded import Chosen
from toughen.data.stream import PictureReader, StreamedSet
from toughen.engine.provenance import provenance

BATCH = 128
USUAL = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
    ]
)


class Decoded(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's CIFAR10 is: decoded arrays, made a PIL image, transformed one by one."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.arrays, self.labels = images.permute(0, 2, 3, 1).numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return USUAL(Image.fromarray(self.arrays[row])), self.labels[row]


class Encoded(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's ImageFolder is: files, decoded and transformed one by one."""

    def __init__(self, splits: DataSplits) -> None:
        train = splits.train
        assert isinstance(train, StreamedSet)
        assert isinstance(train.reader, PictureReader)
        self.pictures, self.labels = Chosen(train.reader.pictures, train.rows), train.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        content = self.pictures[row].content
        with Image.open(io.BytesIO(content)) as image:
            return USUAL(image.convert("RGB")), self.labels[row]


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", help="a local copy of CIFAR-10")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def splits(storage: str) -> DataSplits:
        settings = DataSettings(
            name="cifar10",
            path=options.cifar10,
            validation=10,
            train_samples=options.samples,
            test_samples=10,
            image_size=32,
            storage=storage,
        )
        return data.load(settings, device=device)

    resident, streamed = splits("resident"), splits("streamed")
    ours = {"batch_size": BATCH, "device": device, "seed": 0, "augment": (CropFlip(pad=4),)}
    on_device = data.train_loader(resident, **ours)
    by_workers = data.train_loader(streamed, workers=options.workers, **ours)

    def usual(dataset: Dataset[tuple[torch.Tensor, int]]) -> Callable[[int], Iterable[object]]:
        loader = DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
            persistent_workers=options.workers > 0,
        )
        return lambda _: ((x.to(device), y.to(device)) for x, y in loader)

    kinds: dict[str, Callable[[int], Iterable[object]]] = {
        "on the device": on_device.epoch,
        "torchvision, decoded arrays": usual(Decoded(resident.train.images, resident.train.labels)),
        "streamed by workers": by_workers.epoch,
        "torchvision, encoded files": usual(Encoded(streamed)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        for name, epoch in kinds.items():
            started = time.perf_counter()
            for _ in epoch(number):
                pass
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up: worker processes, caches
                seconds[name].append(time.perf_counter() - started)
    images = options.samples // BATCH * BATCH
    rates = {name: images / statistics.median(values) for name, values in seconds.items()}
    table = Table("loader", "images/s", "of torchvision's", title=f"{images} images, batch {BATCH}, crop and flip")
    peers = {
        "on the device": "torchvision, decoded arrays",
        "streamed by workers": "torchvision, encoded files",
    }
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates[peers[name]]:.2f} x" if name in peers else "")
    Console().print(table)
    if options.json:
        found = {
            "images": images,
            "rounds": options.rounds,
            "workers": options.workers,
            "images_per_second": rates,
            "seconds": seconds,
            "ratio": {name: rates[name] / rates[peer] for name, peer in peers.items()},
            **provenance(seed=0, device=device, precision="32-true"),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
