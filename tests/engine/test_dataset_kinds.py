"""One epoch on each kind of data set, in its local form."""

from collections.abc import Callable
from pathlib import Path

import pytest

from public_layouts import (
    CIFAR10_NAMES,
    cifar10_binary,
    edm_npz,
    hub_cache,
    imagenette_folders,
    write_card,
    write_cifar_binary,
    write_class_folders,
)
from small_runs import recipe
from toughen.data.cifar import CIFAR100_CLASSES
from toughen.data.imagenet import imagenet_classes
from toughen.engine import Trainer
from toughen.errors import InputError


def cifar100_binary(root: Path) -> None:
    labels = [label for label in range(100) for _ in range(2)]
    write_cifar_binary(root, {"train.bin": labels, "test.bin": list(range(100))}, coarse=True)


def folders(root: Path, names: list[str], test: str) -> None:
    write_class_folders(root / "train", names)
    write_class_folders(root / test, names, count=1)


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "folder": ("folder", lambda root: folders(root, ["cat", "dog"], "test")),
    "folder without a test set": ("folder", lambda root: write_class_folders(root, ["cat", "dog"], count=6)),
    "parquet": ("parquet", lambda root: write_card(root, 3)),
    "cifar10 parquet": ("cifar10", lambda root: write_card(root, 10)),
    "cifar10 binary": ("cifar10", cifar10_binary),
    "cifar10 folders": ("cifar10", lambda root: folders(root, CIFAR10_NAMES, "test")),
    "cifar100 binary": ("cifar100", cifar100_binary),
    "cifar100 folders": ("cifar100", lambda root: folders(root, list(CIFAR100_CLASSES), "test")),
    "imagenette folders": ("imagenette160", imagenette_folders),
    "imagenet folders": ("imagenet", lambda root: folders(root, list(imagenet_classes()), "val")),
    "imagenet parquet": ("imagenet", lambda root: write_card(root, 1000, test="validation", shards=2)),
}


@pytest.mark.parametrize("storage", ["resident", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_trains_for_an_epoch_from_its_local_form(tmp_path: Path, kind: str, storage: str) -> None:
    name, write = KINDS[kind]
    if storage == "streamed" and "binary" in kind:
        storage = "auto"  # records without a picture format are in memory as they are read
    write(tmp_path / "data")
    settings = {"name": f"{name}:{tmp_path / 'data'}", "validation": 2, "train_samples": 2, "test_samples": 2}
    settings |= {"image_size": 8, "storage": storage, "workers": 0, "augment": ["resized_crop", "flip"]}
    plan = {"epochs": 1, "batch_size": 2}
    run = Trainer(recipe(data=settings, train=plan), out=tmp_path / "run", show_progress=False).fit()
    assert [row["epoch"] for row in run.log()] == [1]
    assert run.evaluations("last")["clean"]["n"] == 2


def test_a_card_of_the_hub_trains_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_card(tmp_path / "files", 3)
    hub_cache(tmp_path / "cache", "me/animals", tmp_path / "files")
    settings = {"name": "hf:me/animals", "validation": 1, "train_samples": 3, "test_samples": 2, "image_size": 8}
    run = Trainer(recipe(data=settings, train={"epochs": 1, "batch_size": 3}), out=tmp_path / "run").fit()
    assert run.config()["data"]["path"] == "me/animals"  # a name on the hub, not a place on this machine


def test_generated_images_train_beside_the_real_ones(tmp_path: Path) -> None:
    write_card(tmp_path / "real", 3)
    edm_npz(tmp_path / "generated.npz", [0, 1, 2] * 4)
    extra = {"path": str(tmp_path / "generated.npz"), "fraction": 0.5}
    settings = {"name": f"parquet:{tmp_path / 'real'}", "validation": 1, "train_samples": None, "test_samples": None}
    changes = {"data": {**settings, "extra": extra}, "train": {"epochs": 1, "batch_size": 4}}
    trainer = Trainer(recipe(**changes), out=tmp_path / "run")
    indices = [batch.index.tolist() for batch in trainer.loader.epoch(0)]
    assert len(indices) == 2  # 5 real images, 4 in a batch
    assert all(sum(index < 5 for index in batch) == 2 for batch in indices)
    assert trainer.fit().finished


def test_images_without_a_label_are_refused_where_the_method_learns_nothing_from_them(tmp_path: Path) -> None:
    write_card(tmp_path / "real", 3)
    edm_npz(tmp_path / "generated.npz", [0, 1, 2, -1] * 3)
    extra = {"path": str(tmp_path / "generated.npz"), "fraction": 0.5}
    settings = {"name": f"parquet:{tmp_path / 'real'}", "validation": 1, "train_samples": None, "test_samples": None}
    wanted = recipe(data={**settings, "extra": extra}, train={"epochs": 1, "batch_size": 4})
    with pytest.raises(InputError, match=r"^3 of the extra images have no label \(-1\), from which PGD-AT learns"):
        Trainer(wanted, out=tmp_path / "run")
