"""MART (Wang et al. 2020): boosted cross-entropy of perturbed images, and a divergence that misclassified ones rule."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toughen.attacks.probabilities import kl_divergence, log_probabilities
from toughen.errors import check_choices
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import labelled_mean
from toughen.objectives.objective import METHODS, Objective
from toughen.objectives.settings import check_weight
from toughen.objectives.start import Start, search_start
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("mart")
@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """E BCE(p(x'), y) + beta * KL(p(x) || p(x')) * (1 - p_y(x)), where x' maximises the cross-entropy.

    BCE(p, y) = -log p_y - log(1 - p_t), with t the most probable class but y. Nothing is detached. As in the official
    code the ones are 1.0000001 in the weight, and 1.0001 + 1e-12 in the logarithm, which bounds it. An image without a
    label (-1) contributes nothing.

    Where we differ: the official code adds 1e-12 to p(x') in the divergence too; here its logarithm comes from the
    logits, so an image that is wrong with certainty keeps its gradient.

    Args:
        beta: Weight of the divergence, >= 0; the official scripts have 5 (ResNet-18) and 6 (WideResNet-34-10).
        start: Where the search begins, as in ``TRADES``.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "MART"
    shards: ClassVar[bool] = True

    beta: float = 5.0
    start: Start = "gaussian"

    def __post_init__(self) -> None:
        check_choices(self, where="mart")
        check_weight(self.beta, where="mart beta")

    def search_start(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See ``Objective.search_start``."""
        return search_start(batch, self.start, generator)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the boosted cross-entropy plus ``beta`` times the weighted divergence."""
        y = adv.batch.y
        log_clean, log_perturbed = log_probabilities(view(adv.batch.x)), log_probabilities(view(adv.x_adv))
        boosted = labelled_mean(_boosted_cross_entropy(log_perturbed, y), y)
        weight = 1.0000001 - _of(log_clean, y).exp()
        divergence = labelled_mean(kl_divergence(log_clean, log_perturbed) * weight, y)
        terms = {"bce": boosted.detach(), "weighted_kl": divergence.detach()}
        return StepOutput(boosted + self.beta * divergence, terms)


def _boosted_cross_entropy(log_p: Tensor, y: Tensor) -> Tensor:
    """-log p_y - log(1 - p_t), [B], where t is the most probable class but y."""
    others = log_p.detach().scatter(1, y.clamp(min=0)[:, None], -torch.inf)
    margin = 1.0001 - _of(log_p, others.argmax(dim=1)).exp() + 1e-12
    return -_of(log_p, y) - margin.log()


def _of(values: Tensor, classes: Tensor) -> Tensor:
    """The value of each sample's class, [B]; of class 0 for an image without a label, which nobody counts."""
    return values.gather(1, classes.clamp(min=0)[:, None]).squeeze(1)
