"""What is known of a network that is handed on: from its run folder, its model and its images."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from toughen.data import DataSplits
from toughen.engine import ModelSettings
from toughen.errors import InputError
from toughen.models import Exported, Normalize
from toughen.run_folder import RunFolder
from toughen.types import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A network of a run, and what was measured of it.

    Attributes:
        name: What the card calls it.
        network: What to build, see ``Exported``.
        checkpoint: ``"last"`` or ``"best"`` on validation images.
        epoch: Epochs done when it was written.
        method: What the run's log calls it.
        evaluations: Of this checkpoint, by attack.
        num_test: Test images that there are.
        num_parameters: Of the network.
        extra_data: Whether it has seen other images than those of its data set: generated ones, or through published
            weights.
        selected: Layers that trained at the end; None is all.
        provenance: As in the run folder.
        license: An identifier such as ``apache-2.0``; None is not said.
    """

    name: str
    network: Exported
    checkpoint: str
    epoch: int
    method: str
    evaluations: dict[str, dict[str, Any]]
    num_test: int
    num_parameters: int
    extra_data: bool
    selected: tuple[str, ...] | None
    provenance: dict[str, Any]
    license: str | None = None


def facts_of_run(
    run: RunFolder,
    settings: ModelSettings,
    model: nn.Module,
    splits: DataSplits,
    *,
    threat: ThreatModel,
    step_size: float,
    checkpoint: str,
    epoch: int,
    name: str | None = None,
    license: str | None = None,
) -> Facts:
    """Collect what is known of a checkpoint of a run.

    Args:
        run: Its folder.
        settings: Of the network, as in the recipe.
        model: The network with the weights of the checkpoint.
        splits: The images of the run.
        threat: That it was measured with.
        step_size: Of PGD there.
        checkpoint: ``"last"`` or ``"best"``.
        epoch: Of the checkpoint.
        name: What the card calls it; None is the folder's name.
        license: Of the weights, which the user chooses.

    Raises:
        InputError: The checkpoint was not evaluated.
    """
    found = {attack: one for attack, one in run.evaluations(checkpoint).items() if one["epoch"] == epoch}
    if not found:
        raise InputError(
            f"run {run.path} has no evaluation of its checkpoint {checkpoint!r}, which the card is to tell; measure it"
            f" with `toughen evaluate {run.path} --checkpoint {checkpoint}`"
        )
    normalize = next((module for module in model.modules() if isinstance(module, Normalize)), None)
    network = Exported(
        model=settings.name,
        width=settings.width,
        image_shape=splits.train.shape,
        mean=None if normalize is None else tuple(normalize.mean.flatten().tolist()),
        std=None if normalize is None else tuple(normalize.std.flatten().tolist()),
        classes=tuple(splits.train.classes),
        data=splits.name,
        norm=threat.norm,
        eps=threat.eps,
        step_size=step_size,
    )
    row = next(row for row in reversed(run.log()) if row["epoch"] <= epoch)
    return Facts(
        name=name or run.path.resolve().name,
        network=network,
        checkpoint=checkpoint,
        epoch=epoch,
        method=row["method"],
        evaluations=found,
        num_test=len(splits.test),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        extra_data=run.config()["data"].get("extra") is not None or settings.pretrained,
        selected=None if row["selected"] is None else tuple(row["selected"]),
        provenance=run.provenance(),
        license=license,
    )
