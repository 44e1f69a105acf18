"""Training runs on every way that images can come: streamed, mixed with extra ones, from the user's own code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import TensorDataset

from small_runs import clat, document, log, outcome, recipe, resume
from toughen import data
from toughen.data import StreamedSet
from toughen.engine import Interrupted, Trainer, create_model
from toughen.errors import InputError
from toughen.run_folder import RunFolder


class PowerCut(BaseException):
    """What stops a run from inside."""


def pictures(root: Path, *, size: int = 10) -> Path:
    """Two classes that differ in brightness, 30 training and 10 test images each."""
    draws = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for label, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 128, (size, size, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(root / part / name / f"{number:02}.png")
    return root


def generated(file: Path, *, count: int = 40) -> Path:
    labels = np.arange(count) % 3 - 1  # -1, 0, 1
    np.savez(file, image=np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), label=labels)
    return file


def sections(tmp_path: Path, kind: str) -> dict[str, Any]:
    settings = {"name": f"folder:{pictures(tmp_path / 'pictures')}", "image_size": 8, "validation": 10}
    settings |= {"train_samples": None, "test_samples": None}
    if kind == "streamed":
        settings |= {"storage": "streamed", "workers": 1, "augment": ["resized_crop", "flip"]}
    if kind == "mixed":
        settings |= {"extra": {"path": str(generated(tmp_path / "extra.npz")), "fraction": 0.5}}
    train = {"epochs": 3, "batch_size": 10, "checkpoint_steps": 1}
    return {"data": settings, "train": train, **clat(start_epoch=1, every=1)}


@pytest.mark.parametrize("kind", ["resident", "streamed", "mixed"])
def test_a_run_cut_inside_an_epoch_ends_as_if_it_had_not_been(tmp_path: Path, kind: str) -> None:
    wanted = recipe(**sections(tmp_path, kind))
    total = 0

    def count(*_: object) -> None:
        nonlocal total
        total += 1
        if total == limit:
            raise PowerCut

    limit = 0
    model = create_model(wanted.model, data.load(wanted.data))
    model.register_forward_hook(count)
    run = Trainer(wanted, out=tmp_path / "whole", model=model).fit()

    total, limit = 0, int(0.6 * total)
    model = create_model(wanted.model, data.load(wanted.data))
    model.register_forward_hook(count)
    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "run", model=model).fit()
    assert not RunFolder(tmp_path / "run").finished
    assert outcome(resume(tmp_path / "run")) == outcome(run)


@pytest.mark.parametrize("cut", [False, True])
def test_skipped_images_are_counted_in_each_epoch_also_after_a_cut(tmp_path: Path, cut: bool) -> None:
    changes = sections(tmp_path, "streamed")
    for number in (7, 8, 9):
        (tmp_path / "pictures" / "train" / "dark" / f"{number:02}.png").write_bytes(b"broken")
    changes["data"] |= {"on_error": "skip", "validation": 1, "workers": 0}
    changes["train"] |= {"batch_size": 29, "epochs": 2}  # two steps an epoch show all but one image
    plan = recipe(**changes)
    trainer = Trainer(plan, out=tmp_path / "run")
    if cut:
        trainer._wishes._heard.append(2)  # as a signal would, before the first step
        with pytest.raises(Interrupted):
            trainer.fit()
        assert trainer.progress.step == 1
        run = resume(tmp_path / "run")
    else:
        run = trainer.fit()
    loader = Trainer(plan, out=tmp_path / "other").loader
    expected = [58 - sum(len(batch.y) for batch in loader.epoch(number)) for number in (0, 1)]
    assert [row.get("skipped_images", 0) for row in log(run)] == expected
    assert max(expected) >= 2


def test_a_data_set_from_python_trains_by_a_recipe(tmp_path: Path) -> None:
    x, y = torch.rand(60, 3, 8, 8), torch.arange(60) % 3
    splits = data.from_torch(TensorDataset(x, y), TensorDataset(x[:9], y[:9]), validation=6, name="mine")
    run = Trainer(recipe(train={"epochs": 1, "batch_size": 9}), out=tmp_path / "run", data=splits).fit()
    assert run.log()[0]["validation"]["n"] == 6


def test_a_run_that_began_from_a_file_needs_it_no_more(tmp_path: Path) -> None:
    wanted = recipe()
    start = create_model(wanted.model, data.load(wanted.data), seed=5)
    torch.save({"state_dict": start.state_dict()}, tmp_path / "start.pt")
    run = Trainer(
        recipe(model={"weights": str(tmp_path / "start.pt")}, train={"epochs": 1, "lr": 0.0}), out=tmp_path / "run"
    ).fit()
    weights = run.config()["model"]["weights"]
    assert weights == str(tmp_path / "start.pt")
    Path(weights).unlink()
    trainer = Trainer(recipe(model={"weights": weights}), out=tmp_path / "run", resume=True)
    frozen = dict(start.named_parameters())
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.model.named_parameters())


def test_images_that_do_not_fit_in_memory_stream_by_themselves(tmp_path: Path) -> None:
    changes = sections(tmp_path, "resident")
    changes["data"] |= {"resident_share": 1e-9, "workers": 0}
    trainer = Trainer(recipe(**changes), out=tmp_path / "run")
    assert isinstance(trainer.data.train, StreamedSet)


def own_splits(count: int) -> data.DataSplits:
    x, y = torch.rand(count, 3, 8, 8), torch.arange(count) % 3
    return data.from_torch(TensorDataset(x, y), TensorDataset(x[:9], y[:9]), validation=6, name="mine")


def test_a_run_on_ones_own_images_does_not_go_on_with_others(tmp_path: Path) -> None:
    plan = recipe(train={"epochs": 2, "batch_size": 9})
    trainer = Trainer(plan, out=tmp_path / "run", data=own_splits(60))
    trainer._epoch_start()  # nothing has been trained yet; the folder stands
    with pytest.raises(InputError, match=r"began on other images \(mine, 54 for training\) than these \(digits, 60\)"):
        resume(tmp_path / "run")
    Trainer(plan, out=tmp_path / "run", data=own_splits(60), resume=True)


def test_extra_images_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.extra is none\.npz, and these images of your own come without"):
        Trainer(recipe(data={"extra": {"path": "none.npz"}}), out=tmp_path / "run", data=own_splits(60))


def test_images_need_not_be_square(tmp_path: Path) -> None:
    x, y = torch.rand(30, 1, 8, 12), torch.arange(30) % 3
    splits = data.from_torch(TensorDataset(x, y), TensorDataset(x, y), validation=6)
    run = Trainer(recipe(train={"epochs": 1, "batch_size": 8}), out=tmp_path / "run", data=splits).fit()
    assert run.finished


def test_a_termination_of_the_whole_process_group_still_writes_the_checkpoint(tmp_path: Path) -> None:
    changes = sections(tmp_path, "streamed")
    changes["train"] |= {"epochs": 10_000}
    del changes["method"]
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(document(**changes)))
    command = [sys.executable, "-m", "toughen", "train", str(recipe_file), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log_file = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not log_file.exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Continue with: toughen train --resume" in said
