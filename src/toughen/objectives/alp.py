"""Adversarial logit pairing (Kannan et al. 2018): an image and its perturbed form shall have the same logits."""

from dataclasses import dataclass
from typing import Literal

import torch

from toughen.attacks import CrossEntropy, Goal, LeastLikely
from toughen.attacks.probabilities import at_least_float32
from toughen.errors import check_choices
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy, labelled_mean
from toughen.objectives.objective import METHODS, Objective
from toughen.objectives.settings import check_label_smoothing, check_weight, smoothed_label
from toughen.types import AdversarialBatch, StepOutput


@METHODS.register("alp")
@dataclass(frozen=True, kw_only=True)
class ALP(Objective):
    """E 1/2 CE(F(x), y) + 1/2 CE(F(x'), y) + weight * ||F(x') - F(x)||^2, the last per class or as it is.

    Both images of a pair go through one forward, so batch norm in train mode uses the statistics of all of them
    together, as in the official code. Nothing is detached. An image without a label (-1) contributes nothing.

    Args:
        weight: Weight of the pairing, >= 0; 0 is adversarial training on clean and perturbed images in equal parts.
        pairing: ``"mean"`` divides the squared distance by the number of classes, as the official code does;
            ``"sum"`` does not.
        target: What the attack is after: ``"away"`` from the true class, or ``"least-likely"``, towards the class that
            the clean image is least likely to be, as the released networks were trained.
        label_smoothing: s of ``cross_entropy``, in [0, 1); 0.1 in the official code.

    Raises:
        InputError: A setting is out of its range.
    """

    weight: float = 0.5
    pairing: Literal["mean", "sum"] = "mean"
    target: Literal["away", "least-likely"] = "away"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, where="alp")
        check_weight(self.weight, where="alp weight")
        check_label_smoothing(self.label_smoothing, where="alp")

    @property
    def label(self) -> str:  # type: ignore[override]  # a property of the settings here, of the class elsewhere
        """``"ALP"``, or for example ``"ALP (label smoothing 0.1)"``."""
        return smoothed_label("ALP", self.label_smoothing)

    def goal(self) -> Goal:
        """Return the cross-entropy, or the way to the least likely class."""
        return CrossEntropy() if self.target == "away" else LeastLikely()

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of both forms plus ``weight`` times the distance of their logits."""
        y = adv.batch.y
        clean, perturbed = at_least_float32(view(torch.cat((adv.batch.x, adv.x_adv)))).chunk(2)
        clean_ce = cross_entropy(clean, y, label_smoothing=self.label_smoothing)
        adv_ce = cross_entropy(perturbed, y, label_smoothing=self.label_smoothing)
        squares = (perturbed - clean).square()
        distance = labelled_mean(squares.mean(dim=1) if self.pairing == "mean" else squares.sum(dim=1), y)
        terms = {"clean_ce": clean_ce.detach(), "adv_ce": adv_ce.detach(), "pairing": distance.detach()}
        return StepOutput((clean_ce + adv_ce) / 2 + self.weight * distance, terms)
