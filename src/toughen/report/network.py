"""A trained network as its run folder tells of it: what it reached, and what it cost."""

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
        last, log = run.evaluations("last"), run.log()
        if not run.finished and not (last and log):
            path = (run.parent_run or run).path
            raise InputError(f"run {run.path} has no evaluation yet; finish it with `toughen train --resume {path}`")
        if not last:
            raise InputError(f"run {run.path} has no evaluation; measure it with `toughen evaluate {run.path}`")
        if not log:
            raise InputError(f"run {run.path} has lost its log.jsonl; copy the whole folder of the run")
        return cls(
            path=str(run.path),
            config=run.config(),
            method=log[-1]["method"],
            epochs=max(found["epoch"] for found in last.values()),  # not the log's: a run that collapsed went back
            last=_newest(last),
            best=_newest(run.evaluations("best")),
            trained=log[-1]["trainable_share"],
            seconds=sorted(row["seconds"] for row in log)[len(log) // 2],
            flops=sum(row["gflops_per_image"] / row["pgd_at_gflops_per_image"] for row in log) / len(log),
        )

    @property
    def seed(self) -> int:
        """Of its training."""
        return int((self.config.get("train") or {}).get("seed", 0))

    def results(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """Return the evaluations of a checkpoint, by attack."""
        return self.last if checkpoint == "last" else self.best


def _newest(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without those of an earlier epoch, which are of another network."""
    epoch = max((result["epoch"] for result in results.values()), default=0)
    return {attack: result for attack, result in results.items() if result["epoch"] == epoch}
