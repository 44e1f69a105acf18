"""Ordinary training: cross-entropy on clean images (the start of Table 11)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from toughen.attacks import Attack
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("clean")
@dataclass(frozen=True)
class CleanCE(Objective):
    """E CE(F(x), y): no attack at all."""

    label: ClassVar[str] = "clean"
    shards: ClassVar[bool] = True

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Return the clean images themselves."""
        return AdversarialBatch(batch, batch.x)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the clean images."""
        loss = cross_entropy(view(adv.batch.x), adv.batch.y)
        return StepOutput(loss, {"clean_ce": loss.detach()})
