"""PGD adversarial training (Madry et al. 2018): cross-entropy on the worst images that PGD finds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from toughen.attacks import Attack
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("pgd-at")
@dataclass(frozen=True)
class PGDAT(Objective):
    """E max_delta CE(F(x + delta), y). The attack's ``model_mode`` says in which mode it sees the model."""

    label: ClassVar[str] = "PGD-AT"

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Maximise the cross-entropy."""
        return AdversarialBatch(batch, attack(model, batch.x, batch.y, start=batch.start, generator=generator))

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images."""
        loss = cross_entropy(view(adv.x_adv), adv.batch.y)
        return StepOutput(loss, {"adv_ce": loss.detach()})
