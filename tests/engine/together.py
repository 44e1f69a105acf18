"""Trains cases in as many processes as ``torchrun`` starts: ``together.py FOLDER STRATEGY [--killed] NAME...``.

What each process ends with is written beside the run, so that a test can compare it with one process's.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_runs import recipe
from toughen import Trainer, models, processes
from toughen.engine import trainer as training
from toughen.engine.update import Updater
from toughen.types import Batch

PGD_AT = {"name": "pgd-at"}
CLAT = {"name": "clat", "k": 2, "start_epoch": 1, "every": 1}
CASES: dict[str, list[dict[str, Any]]] = {
    "PGD-AT": [PGD_AT],
    "TRADES + CLAT": [{"name": "trades"}, CLAT],
    "CLAT, statistics move": [PGD_AT, {**CLAT, "select": "random", "norm_stats": "update"}],
    "PGD-AT + CLAT + AWP": [PGD_AT, {**CLAT, "base": "inner", "select": "random"}, {"name": "awp"}],
    "PGD-AT + ATTA": [PGD_AT, {"name": "carry-over"}],
    "PGD-AT + EMA": [PGD_AT, {"name": "ema"}],
    "PGD-AT + SWA": [PGD_AT, {"name": "swa", "start_epoch": 2}],
    "PGD-AT + LoRA": [PGD_AT, {"name": "lora", "rank": 2}],
    "GradAlign": [{"name": "gradalign"}],
    "PGD-AT + RiFT": [PGD_AT, {"name": "rift", "start_epoch": 3}],
    "Free-AT": [{"name": "free-at", "replays": 3}],
    "AutoLoRA": [{"name": "autolora", "rank": 2, "probe_size": 40}],
}
# what a case sets beside its method
SECTIONS: dict[str, dict[str, Any]] = {
    "a branch with local norms": {"branch_epoch": 2, "branches": {"local": {"train": {"batch_norm": "local"}}}},
}
BRANCHED = {name: [PGD_AT] for name in SECTIONS}
OWN_NORM = {"a norm of its own": [PGD_AT], "a norm of its own, averaged": [PGD_AT, {"name": "swa"}]}
SHARDED: dict[str, list[dict[str, Any]]] = {  # a name that begins with ViT trains one
    "PGD-AT": CASES["PGD-AT"],
    "TRADES + CLAT": [{"name": "trades"}, {**CLAT, "select": "random"}],
    "ViT, PGD-AT + CLAT": [PGD_AT, {**CLAT, "select": "random"}],
    "ViT, TRADES + CLAT (inner loss)": [{"name": "trades"}, {**CLAT, "base": "inner"}],
    "ViT, MART + ATTA": [{"name": "mart"}, {"name": "carry-over"}],
}


def ended(run: Path) -> dict[str, Tensor]:
    """What the processes of a run ended with, by the name of the file."""
    return {file.stem: torch.load(file) for file in sorted(run.glob("rank*.pt"))}


def dies_once(at: int) -> None:
    """Let the second process be killed at an update, unless it was started again."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" or os.environ["RANK"] != "1":
        return
    update, made = Updater.update, 0

    def killed(self: Updater, batch: Batch, *place: int) -> dict[str, Tensor]:
        nonlocal made
        made += 1
        if made == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, batch, *place)

    Updater.update = killed  # type: ignore[method-assign]


class OwnNorm(nn.BatchNorm2d):
    """A norm that may do more than PyTorch's, and so keeps statistics of its own images alone."""


def net_with_own_norm() -> nn.Module:
    torch.manual_seed(0)
    features = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), OwnNorm(4), nn.ReLU())
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(4 * 16, 10))


class Precise(nn.Module):
    """A network that computes in float64.

    TRADES' first gradient is a difference of nearly equal numbers: in float32 its signs are rounding's, which differs
    between one process and two, and from machine to machine.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.double())
        return logits


def small_cnn() -> nn.Module:
    return models.create("small_cnn", in_channels=1, width=2, seed=0)


def vit() -> nn.Module:
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # each process draws another, and the first one's counts
    sizes = {"img_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 24, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes)


@contextmanager
def trained_weights_kept(trainer: Trainer, file: Path) -> Iterator[None]:
    """Inside, what training ends with is written before the checkpoints are evaluated, which all processes read."""
    evaluate = training.evaluate_checkpoints

    def kept(model: nn.Module, *rest: Any) -> Any:
        deployed = {f"deployed.{name}": value for name, value in trainer._state.network().state_dict().items()}
        torch.save({**model.state_dict(), **deployed}, file)
        return evaluate(model, *rest)

    training.evaluate_checkpoints = kept
    try:
        yield
    finally:
        training.evaluate_checkpoints = evaluate


def main(folder: Path, cases: dict[str, list[dict[str, Any]]], names: Sequence[str], **settings: Any) -> None:
    for name in names:
        run = folder / name
        resume = (run / "config.yaml").exists()
        build = vit if name.startswith("ViT") else net_with_own_norm if name in OWN_NORM else small_cnn
        sections = {"method": cases[name], **SECTIONS.get(name, {})}
        wanted = recipe(**sections, train={"epochs": 5, **({} if build is small_cnn else {"lr": 0.02}), **settings})
        trainer = Trainer(wanted, out=run, model=Precise(build()), resume=resume, show_progress=False)
        with trained_weights_kept(trainer, run / f"rank{processes.rank()}.pt"):
            trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("--killed", action="store_true")
    parser.add_argument("--unlike", action="store_true")
    parser.add_argument("names", nargs="+")
    given = parser.parse_args()
    if given.killed:
        dies_once(at=8)
    unlike = {"lr": 0.01 * (1 + int(os.environ["RANK"]))} if given.unlike else {}
    among = SHARDED if given.strategy == "fsdp" else CASES | OWN_NORM | BRANCHED
    every = 1 if given.killed else None
    main(given.folder, among, given.names, strategy=given.strategy, checkpoint_steps=every, **unlike)
