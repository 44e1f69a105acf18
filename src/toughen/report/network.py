"""A trained network as its run folder tells of it: what it reached, and what it cost."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from toughen.errors import InputError
from toughen.run_folder import RunFolder

Checkpoint = Literal["last", "best"]
CHECKPOINTS: tuple[Checkpoint, ...] = ("last", "best")


@dataclass(frozen=True)
class Network:
    """A run, or a branch of one.

    Attributes:
        path: Of its folder.
        config: Its resolved recipe.
        method: What its log calls it.
        epochs: Of its last checkpoint, those before the branch included.
        last: Evaluations of the last checkpoint, by attack.
        best: Of the best on validation.
        trained: Share of the weights that train, in [0, 1], at its last epoch.
        seconds: Of an epoch, the median of its own.
        flops: Of a training step relative to a PGD-AT step of the same attack, mean of its own epochs.
    """

    path: str
    config: dict[str, Any]
    method: str
    epochs: int
    last: dict[str, dict[str, Any]]
    best: dict[str, dict[str, Any]]
    trained: float
    seconds: float
    flops: float

    @classmethod
    def read(cls, run: RunFolder) -> "Network":
        """Read it from its folder.

        Raises:
            InputError: It has no evaluation yet, or a file is damaged.
        """
        try:
            return cls._read(run)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"run {run.path} is damaged: its log or evaluations are not of toughen's form") from error

    @classmethod
    def _read(cls, run: RunFolder) -> "Network":
        last, log = run.evaluations("last"), run.log()
        if not run.finished and not (last and log):
            path = (run.parent_run or run).path
            raise InputError(f"run {run.path} has no evaluation yet; finish it with `toughen train --resume {path}`")
        if not last:
            raise InputError(f"run {run.path} has no evaluation; measure it with `toughen evaluate {run.path}`")
        if not log:
            raise InputError(f"run {run.path} has lost its log.jsonl; copy the whole folder of the run")
        best = run.evaluations("best")
        for found in (*last.values(), *best.values()):
            _check(found)
        return cls(
            path=str(run.path),
            config=checked_config(run),
            method=str(log[-1]["method"]),
            epochs=max(found["epoch"] for found in last.values()),  # not the log's: a run that collapsed went back
            last=_newest(last),
            best=_newest(best),
            trained=float(log[-1]["trainable_share"]),
            seconds=float(sorted(row["seconds"] for row in log)[len(log) // 2]),
            flops=sum(row["gflops_per_image"] / row["pgd_at_gflops_per_image"] for row in log) / len(log),
        )

    @property
    def seed(self) -> int:
        """Of its training."""
        return int((self.config.get("train") or {}).get("seed", 0))

    def results(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return the evaluations of a checkpoint, by attack."""
        return self.last if checkpoint == "last" else self.best


def checked_config(run: RunFolder) -> dict[str, Any]:
    """Read the recipe of a run, which may be anybody's, as far as a comparison reads it.

    Raises:
        InputError: What it reads is not there, or of another kind; or the name of a branch leads out of the folder.
    """
    config = run.config()
    data, threat, train = config.get("data"), config.get("threat"), config.get("train") or {}
    branches = config.get("branches") or {}
    if not (
        (isinstance(data, dict) and isinstance(data.get("name"), str))
        and (isinstance(threat, dict) and type(threat.get("eps")) in (int, float))
        and (isinstance(train, dict) and type(train.get("seed", 0)) is int)
        and (isinstance(branches, dict) and all(re.fullmatch(r"[\w-]+", str(name)) for name in branches))
    ):
        raise InputError(f"{run.config_file} is damaged: its data, threat, seed or branches are not of toughen's form")
    return config


def _check(found: dict[str, Any]) -> None:
    """Raise a ``TypeError`` or ``KeyError`` where an evaluation is not what ``toughen evaluate`` writes."""
    correct = found["correct"]
    if not (isinstance(correct, list) and correct and all(right in (0, 1) for right in correct)):
        raise TypeError("correct")
    if type(found["epoch"]) is not int or type(found["n"]) is not int or type(found["seed"]) is not int:
        raise TypeError("epoch, n or seed")
    if not isinstance(found["settings"], dict) or not isinstance(found["images_sha256"], str):
        raise TypeError("settings or images")


def _newest(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without those of an earlier epoch, which are of another network."""
    epoch = max((result["epoch"] for result in results.values()), default=0)
    return {attack: result for attack, result in results.items() if result["epoch"] == epoch}
