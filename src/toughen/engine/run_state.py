"""What a run has to remember to go on exactly: its live objects and where it is, in checkpoints and out of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.engine import checkpoint, epoch_sums
from toughen.engine.branch import continue_methods
from toughen.engine.optim import continue_momentum, parameter_names
from toughen.engine.recipe import Recipe
from toughen.engine.sharding import deal_out, gather, load_optimizer, whole
from toughen.engine.versions import check_optimizer, check_state
from toughen.errors import InputError
from toughen.objectives import Live
from toughen.run_folder import RunFolder


@dataclass
class Progress:
    """Where a run is, and what the epoch under way has added up: all that a resume needs beside the live objects."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best: float = -1.0
    best_epoch: int = 0
    collapsed: bool = False
    past: list[float] = field(default_factory=list)  # what the automatic schedule of a branch knows from its run
    flops: float = 0.0
    pgd_at_flops: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


_NAMES = {*vars(Progress()), "live", "optimizer", "parameter_names", "training"}  # of what a checkpoint holds


class RunState:
    """The live objects of a run, and its progress.

    Every process must make the same calls; the first one writes.

    Args:
        model: The network in one piece: what is kept.
        live: The method, bound to it, or to a copy that is dealt out to the processes.
        optimizer: Made by ``make_optimizer``.
        folder: Where the checkpoints are.
    """

    def __init__(self, model: nn.Module, live: Live, optimizer: torch.optim.Optimizer, folder: RunFolder) -> None:
        self.model, self.live, self.optimizer, self.checkpoints = model, live, optimizer, folder.checkpoints
        self.progress = Progress()

    def network(self) -> nn.Module:
        """Return the network to evaluate and to keep, in one piece."""
        if self.live.model is self.model:
            return self.live.deployed()
        gather(self.live.model, self.model)
        return self.model

    def save(self, name: str) -> None:
        """Write a checkpoint."""
        network = self.network()
        self._share_progress()
        state = {
            **vars(self.progress),
            "live": self.live.state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "parameter_names": parameter_names(self.optimizer, self.live),
            "training": None if network is self.model else self.model.state_dict(),
        }
        processes.by_first(lambda: checkpoint.save(self.checkpoints / name, network, state))

    def _share_progress(self) -> None:
        """Let what every process has added up of its own be that of all, as one that resumes will take it."""
        now = self.progress
        if processes.count() > 1:
            now.sums = epoch_sums.of_all(now.sums)
            skipped = round(processes.count() * processes.mean(now.skipped))
            now.skipped = skipped if processes.rank() == 0 else 0

    def go_on_from(self, name: str) -> None:
        """Take up this run where a checkpoint left it, in the middle of an epoch or between two.

        Raises:
            InputError: There is none, it is damaged, or it is not what this run would have written.
        """
        folder = self.checkpoints / name
        state = self._load_weights(folder)
        check_state(state, _NAMES, folder=folder)
        try:
            self._take(state, folder)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"checkpoint {folder} was not written by toughen for this recipe ({type(error).__name__}: {error})"
            ) from None

    def _take(self, state: Mapping[str, Any], folder: Path) -> None:
        names = parameter_names(self.optimizer, self.live)
        check_optimizer(self.optimizer, state["optimizer"], state["parameter_names"], names, folder=folder)
        load_optimizer(self.optimizer, state["optimizer"])
        self.live.load_state_dict(state["live"])
        now = Progress(**{name: state[name] for name in vars(Progress())})
        for name, fresh in vars(Progress()).items():
            if not isinstance(getattr(now, name), (float, int) if isinstance(fresh, float) else type(fresh)):
                raise TypeError(f"{name} is {getattr(now, name)!r}")
        if not all(isinstance(row, dict) for row in now.log):
            raise TypeError("log holds other things than rows")
        device = next(self.model.parameters()).device
        now.sums = {name: value.to(device) for name, value in now.sums.items()}
        now.skipped = now.skipped if processes.rank() == 0 else 0
        processes.check_agree((now.epoch, now.step), "where the run is")
        self.progress = now

    def take_up_best(self) -> None:
        """Go on from the best weights so far, with fresh random draws."""
        calls = self.live.calls
        state = self._load_weights(self.checkpoints / "best")
        self.live.load_state_dict(state["live"])
        self.live.calls = calls

    def continue_from(self, start: RunFolder, recipe: Recipe) -> None:
        """Begin as a branch: weights, momentum, epoch, random streams of a run; the state of the methods they share."""
        state = checkpoint.read_state(start.checkpoints / "last")
        config, methods = start.config(), recipe.document()["method"]
        if methods[: len(config["method"])] == config["method"]:
            checkpoint.take_training(state, self.model)  # once more: adapters of the run are attached only now
        continue_methods(self.live, state["live"], run=config["method"], branch=methods)
        continue_momentum(self.optimizer, self.live, state["optimizer"], state["parameter_names"])
        self.live.calls = state["live"]["calls"]
        self.progress = Progress(epoch=state["epoch"], best_epoch=state["epoch"])
        if recipe.train.schedule == "auto" == config["train"]["schedule"]:
            self.progress.past = [*state["past"], *(row["validation"]["robust"] for row in state["log"])]

    def _load_weights(self, folder: Path) -> dict[str, Any]:
        """Load the weights that training goes on with, and return the state beside them."""
        state = checkpoint.load_training(folder, self.model)
        if self.live.model is not self.model:
            deal_out(self.model, self.live.model)
        return state
