"""PGD adversarial training (Madry et al. 2018): cross-entropy on the worst images that PGD finds."""

from dataclasses import dataclass
from typing import ClassVar

from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, Objective
from toughen.objectives.settings import check_label_smoothing, smoothed_label
from toughen.types import AdversarialBatch, StepOutput


@METHODS.register("pgd-at")
@dataclass(frozen=True, kw_only=True)
class PGDAT(Objective):
    """E max_delta CE(F(x + delta), y). The attack's ``model_mode`` says in which mode it sees the model.

    Args:
        label_smoothing: s of ``cross_entropy`` in the loss, in [0, 1); the attack sees the labels as they are.

    Raises:
        InputError: A setting is out of its range.
    """

    shards: ClassVar[bool] = True

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing, where="pgd-at")

    @property
    def label(self) -> str:  # type: ignore[override]  # a property of the settings here, of the class elsewhere
        """``"PGD-AT"``, or for example ``"PGD-AT (label smoothing 0.1)"``."""
        return smoothed_label("PGD-AT", self.label_smoothing)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images."""
        loss = cross_entropy(view(adv.x_adv), adv.batch.y, label_smoothing=self.label_smoothing)
        return StepOutput(loss, {"adv_ce": loss.detach()})
