"""SCORE (Pang et al. 2022): squared errors of probabilities in the place of cross-entropy and KL divergence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from toughen.attacks import Attack, Goal, ProbabilityShift, SquaredError
from toughen.attacks.probabilities import probabilities, squared_distance, squared_error
from toughen.errors import InputError, check_choices
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import labelled_mean
from toughen.objectives.objective import METHODS, LiveObjective, Objective
from toughen.objectives.settings import check_weight
from toughen.objectives.start import Start, check_attack_moves, search_start
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("pgd-at-lse")
@dataclass(frozen=True, kw_only=True)
class PGDATLSE(Objective):
    """E relu(||p(x') - e_y||^2 - bound), where x' maximises the squared error from the attack's own start.

    bound = c^2 + c^2 / (K - 1) is the squared error of a prediction that misses the label by c and shares c out among
    the K - 1 other classes: an image that does no worse adds nothing, nor does one without a label (-1). The official
    code attacks in train mode: the attack's ``model_mode="unchanged"``.

    Args:
        c: Probability that may be missing, in [0, 1); 0 bounds nothing.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "SCORE (PGD-AT-LSE)"

    c: float = 0.4

    def __post_init__(self) -> None:
        _check_c(self.c, where="pgd-at-lse")

    def goal(self) -> Goal:
        """Return ||p(x') - e_y||^2."""
        return SquaredError()

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the squared error of the perturbed images beyond the bound."""
        p, y = probabilities(view(adv.x_adv)), adv.batch.y
        error = squared_error(p, y)
        loss = labelled_mean((error - _bound(self.c, p)).relu(), y)
        return StepOutput(loss, {"adv_error": labelled_mean(error, y).detach()})


@METHODS.register("trades-lse")
@dataclass(frozen=True, kw_only=True)
class TRADESLSE(Objective):
    """E relu(||p(x) - e_y||^2 + beta * relu(||p(x') - p(x)||^2 - clip) - bound), where x' maximises the last distance.

    bound = c^2 + c^2 / (K - 1), as in ``PGDATLSE``. Nothing is detached in the loss. An image without a label (-1) has
    no squared error, and counts like any other in the mean.

    The two published forms are the defaults, for training without extra data (eval mode, Gaussian start); and
    ``beta=4, c=0, clip=0, start="attack"`` with the attack's ``model_mode="unchanged"``, for generated data.

    Args:
        beta: Weight of the consistency term, >= 0.
        c: Probability that may be missing before an image counts at all, in [0, 1); 0 bounds nothing.
        clip: Squared distance that may be there before consistency counts, in [0, 2]; 0 clips nothing.
        start: Where the search begins, as in ``TRADES``.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "SCORE"
    reads_unlabelled: ClassVar[bool] = True

    beta: float = 6.0
    c: float = 0.3
    clip: float = 0.0
    start: Start = "gaussian"

    def __post_init__(self) -> None:
        check_choices(self, where="trades-lse")
        check_weight(self.beta, where="trades-lse beta")
        _check_c(self.c, where="trades-lse")
        if not 0 <= self.clip <= 2:
            raise InputError(f"trades-lse clip is {self.clip!r}; it must be 0 to 2, the range of a squared distance")

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> LiveObjective:
        """Bind these settings to a model, for use in any training loop.

        Raises:
            InputError: The attack would begin where its goal has no gradient.
        """
        check_attack_moves(self.start, attack, where="trades-lse")
        return LiveObjective(model, objective=self, attack=attack, seed=seed)

    def goal(self) -> Goal:
        """Return ||p(x') - p(x)||^2."""
        return ProbabilityShift()

    def search_start(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See ``Objective.search_start``."""
        return search_start(batch, self.start, generator)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return squared error plus ``beta`` times consistency, beyond the bound, from one forward of each."""
        clean, perturbed = probabilities(view(adv.batch.x)), probabilities(view(adv.x_adv))
        error, shift = squared_error(clean, adv.batch.y), squared_distance(perturbed, clean)
        loss = (error + self.beta * (shift - self.clip).relu() - _bound(self.c, clean)).relu().mean()
        terms = {"clean_error": labelled_mean(error, adv.batch.y).detach(), "shift": shift.mean().detach()}
        return StepOutput(loss, terms)


def _bound(c: float, p: Tensor) -> float:
    """The squared error of a prediction that misses the label by c; p: [B, K]."""
    num_classes = p.shape[1]
    return c**2 + c**2 / (num_classes - 1)


def _check_c(c: float, *, where: str) -> None:
    if not 0 <= c < 1:
        raise InputError(f"{where} c is {c!r}; it is a probability, at least 0 and below 1, for example 0.3")
