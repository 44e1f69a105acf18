"""Where the results of a checkpoint go, and what stands beside them so that only like is compared with like."""

from collections.abc import Mapping

from toughen.data import Images
from toughen.evaluation.evaluate import EvalResult
from toughen.run_folder import RunFolder


def store(run: RunFolder, results: Mapping[str, EvalResult], *, checkpoint: str, epoch: int, images: Images) -> None:
    """Write the results of a run's checkpoint into its folder.

    Args:
        run: The run.
        results: By attack, as ``evaluate`` returns them.
        checkpoint: ``"last"`` or ``"best"``.
        epoch: The epoch of the checkpoint; a later one makes these results out of date.
        images: What was evaluated; its digest tells whether two runs saw the same images.
    """
    facts = {"checkpoint": checkpoint, "epoch": epoch, "images_sha256": images.digest()}
    for attack, result in results.items():
        run.write_evaluation(checkpoint, attack, {**result.to_dict(), **facts})
