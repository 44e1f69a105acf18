"""Trains the cases of ``CASES`` in as many processes as ``torchrun`` starts: ``together.py FOLDER NAME...``.

What each process ends with is written beside the run, so that a test can compare it with one process's.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_runs import recipe
from toughen import Trainer, processes
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
    "PGD-AT + RiFT": [PGD_AT, {"name": "rift", "start_epoch": 3}],
    "Free-AT": [{"name": "free-at", "replays": 3}],
    "AutoLoRA": [{"name": "autolora", "rank": 2, "probe_size": 40}],
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


def main(folder: Path, *names: str, **settings: Any) -> None:
    for name in names:
        run = folder / name
        resume = (run / "config.yaml").exists()
        wanted = recipe(method=CASES[name], train={"epochs": 5, **settings})
        trainer = Trainer(wanted, out=run, resume=resume, show_progress=False)
        trainer.fit()
        torch.save(trainer.model.state_dict(), run / f"rank{processes.rank()}.pt")


if __name__ == "__main__":
    if sys.argv[1] == "--killed":
        dies_once(at=8)
        main(Path(sys.argv[2]), *sys.argv[3:], checkpoint_steps=1)
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
