"""An objective in one file: half of the loss on clean images, half on perturbed ones (Goodfellow et al. 2015)."""

from dataclasses import dataclass
from typing import ClassVar

from toughen.attacks import CrossEntropy, Goal
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.objectives import METHODS, Objective
from toughen.objectives.cross_entropy import cross_entropy
from toughen.types import AdversarialBatch, StepOutput


@METHODS.register("half-and-half")
@dataclass(frozen=True, kw_only=True)
class HalfAndHalf(Objective):
    """(1 - share) * CE(F(x), y) + share * CE(F(x + delta), y).

    Args:
        share: Weight of the perturbed images, in [0, 1]; 0 is clean training, 1 is PGD-AT.

    Raises:
        InputError: ``share`` is outside [0, 1].
    """

    label: ClassVar[str] = "half and half"

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"half-and-half share is {self.share}; it must lie in [0, 1]")

    def goal(self) -> Goal:
        """Return the cross-entropy, which it would be without this."""
        return CrossEntropy()

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the weighted sum."""
        clean = cross_entropy(view(adv.batch.x), adv.batch.y)
        perturbed = cross_entropy(view(adv.x_adv), adv.batch.y)
        terms = {"clean_ce": clean.detach(), "adv_ce": perturbed.detach()}
        return StepOutput((1 - self.share) * clean + self.share * perturbed, terms)
