"""Fast-AT (Wong et al. 2020): adversarial training with a single long step from a random start."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from toughen.attacks import Attack, fgsm_rs
from toughen.attacks.pgd import ModelMode
from toughen.errors import InputError, check_choices
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("fast-at")
@dataclass(frozen=True, kw_only=True)
class FastAT(Objective):
    """E CE(F(x + delta), y), delta = clip(delta_0 + step * eps * sign(gradient at delta_0)), delta_0 uniform.

    The threat model and ``model_mode`` are those of the run's attack, its steps are not used: they serve validation,
    which finds catastrophic overfitting (``train.max_drop``). Where we differ: the official code attacks in train
    mode, which is ``model_mode="unchanged"`` of the attack; and it can carry delta_0 over from the batch before, which
    belongs to other images (for one's own, see ``carry-over``).

    Args:
        step: Length of the step as a multiple of eps, >= 0; 1.25 as published, 1 and below is safer at larger eps.
        start: ``"uniform"`` in the ball; ``"zero"`` is the original FGSM training, which collapses sooner.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "Fast-AT"
    shards: ClassVar[bool] = True

    step: float = 1.25
    start: Literal["uniform", "zero"] = "uniform"

    def __post_init__(self) -> None:
        check_choices(self, where="fast-at")
        if not 0 <= self.step < math.inf:
            raise InputError(f"fast-at step is {self.step!r}; it must be a finite multiple of eps >= 0, such as 1.25")

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Maximise the cross-entropy in one step."""
        single = single_step(attack, step=self.step, random_start=self.start == "uniform")
        return AdversarialBatch(batch, single(model, batch.x, batch.y, start=batch.start, generator=generator))

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images."""
        loss = cross_entropy(view(adv.x_adv), adv.batch.y)
        return StepOutput(loss, {"adv_ce": loss.detach()})


def single_step(attack: Attack, *, step: float, random_start: bool) -> Attack:
    """Return one step of ``step * eps`` in the threat model of ``attack``, and in its mode."""
    mode: ModelMode = getattr(attack, "model_mode", "eval")
    threat = attack.threat
    return fgsm_rs(threat, step_size=step * threat.eps, random_start=random_start, model_mode=mode)
