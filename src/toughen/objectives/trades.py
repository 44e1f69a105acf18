"""TRADES (Zhang et al. 2019): clean cross-entropy plus how far a perturbation moves what the model believes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from toughen.attacks import Attack, Goal, KLToClean
from toughen.attacks.probabilities import kl_divergence, log_probabilities
from toughen.errors import check_choices
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, LiveObjective, Objective
from toughen.objectives.settings import check_label_smoothing, check_weight, smoothed_label
from toughen.objectives.start import Start, check_attack_moves, search_start
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("trades")
@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """E CE(F(x), y) + beta * KL(p(x) || p(x')), where x' maximises the divergence inside the threat model.

    p(x) is the target, and trains too: nothing is detached. The cross-entropy is the mean over the images that have a
    label, the divergence that over all images: one without a label (-1) contributes to the divergence alone.

    Where we differ: the official code runs the clean images twice in train mode; here once, with the same loss, but
    batch-norm statistics see clean and perturbed images in equal parts. It attacks in eval mode, as the attack does by
    default; the code of Gowal, SCORE and Wang attacks in train mode, from a uniform start: ``model_mode="unchanged"``
    of the attack, and ``start="attack"``.

    Args:
        beta: Weight of the divergence, >= 0.
        label_smoothing: s of ``cross_entropy``, in [0, 1); the 0.1 of Wang et al. is 0.1 here.
        start: Where the search begins: ``"gaussian"`` at x + 0.001 N(0, 1), not clamped; ``"attack"`` where the attack
            says. ``Batch.start`` goes before both.
        target_grad: Whether p(x) in the divergence depends on the weights (``"keep"``, as published) or is a constant
            (``"detach"``).

    Raises:
        InputError: A setting is out of its range.
    """

    reads_unlabelled: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    beta: float = 6.0
    label_smoothing: float = 0.0
    start: Start = "gaussian"
    target_grad: Literal["keep", "detach"] = "keep"

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        check_choices(self, where=name)
        check_weight(self.beta, where=f"{name} beta")
        check_label_smoothing(self.label_smoothing, where=name)

    @property
    def label(self) -> str:  # type: ignore[override]  # a property of the settings here, of the class elsewhere
        """``"TRADES"``, or for example ``"TRADES (label smoothing 0.1)"``."""
        return smoothed_label("TRADES", self.label_smoothing)

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> LiveObjective:
        """Bind these settings to a model, for use in any training loop.

        Raises:
            InputError: The attack would begin where its goal has no gradient.
        """
        check_attack_moves(self.start, attack, where=type(self).__name__.lower())
        return LiveObjective(model, objective=self, attack=attack, seed=seed)

    def goal(self) -> Goal:
        """Return KL(p(x) || p(x'))."""
        return KLToClean()

    def search_start(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See ``Objective.search_start``."""
        return search_start(batch, self.start, generator)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return clean cross-entropy plus ``beta`` times the divergence, from one forward of each."""
        clean, perturbed = view(adv.batch.x), view(adv.x_adv)
        clean_ce = cross_entropy(clean, adv.batch.y, label_smoothing=self.label_smoothing)
        target = log_probabilities(clean if self.target_grad == "keep" else clean.detach())
        divergence = kl_divergence(target, log_probabilities(perturbed)).mean()
        terms = {"clean_ce": clean_ce.detach(), "kl": divergence.detach()}
        return StepOutput(clean_ce + self.beta * divergence, terms)
