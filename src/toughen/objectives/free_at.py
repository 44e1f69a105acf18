"""Free-AT (Shafahi et al. 2019): one backward pass gives the step of the weights and that of the perturbation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack
from toughen.attacks.threat import BALLS
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, LiveObjective, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("free-at")
@dataclass(frozen=True, kw_only=True)
class FreeAT(Objective):
    """Each batch is replayed: weights step on CE(F(x + delta), y), then delta steps along the same backward's gradient.

    ``delta = clip(delta + step * eps * sign(gradient), -eps, eps)``. It is never reset: the next batch begins with the
    perturbation of the last one, at the same places of the batch. So a step costs as much as ordinary training, and an
    epoch ``replays`` times as much: divide the epochs by ``replays``. The run's attack gives the threat model alone.

    Where we differ: the official PyTorch code adds delta inside the differentiated part, so a pixel that the box of
    pixels clips has no gradient; here the gradient is taken at the clipped image.

    Args:
        replays: m, how many steps in a row use a batch, at least 1.
        step: Length of the step of delta as a multiple of eps, >= 0.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "Free-AT"
    conflicts: ClassVar[Mapping[str, str]] = {
        "carry-over": "its perturbation goes on from batch to batch already; leave carry-over out"
    }

    takes_parts: ClassVar[bool] = False

    replays: int = 8
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise InputError(f"free-at replays is {self.replays}; a batch must be used at least once")
        if not 0 <= self.step < math.inf:
            raise InputError(f"free-at step is {self.step!r}; it must be a finite multiple of eps >= 0, for example 1")

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> "LiveFreeAT":
        """Bind these settings to a model, for use in a loop that replays batches and calls ``step_end``."""
        return LiveFreeAT(model, objective=self, attack=attack, seed=seed)

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Return the clean images: what was learned of the perturbation is in ``LiveFreeAT``."""
        return AdversarialBatch(batch, batch.x)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images."""
        loss = cross_entropy(view(adv.x_adv), adv.batch.y)
        return StepOutput(loss, {"adv_ce": loss.detach()})


class LiveFreeAT(LiveObjective):
    """Free-AT bound to a model."""

    objective: FreeAT

    def __init__(self, model: nn.Module, *, objective: FreeAT, attack: Attack, seed: int = 0) -> None:
        super().__init__(model, objective=objective, attack=attack, seed=seed)
        self._delta: Tensor | None = None
        self._x_adv: Tensor | None = None

    @property
    def replays(self) -> int:
        """See ``Live.replays``."""
        return self.objective.replays

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Add the perturbation as it is; the backward pass of the loss will leave its gradient at the images."""
        low, high = self.attack.threat.bounds
        self._x_adv = (batch.x + self._delta_for(batch.x)).clamp(low, high).requires_grad_(True)
        return AdversarialBatch(batch, self._x_adv)

    def step_end(self) -> None:
        """Move the perturbation along the gradient that the step of the weights has left."""
        if self._x_adv is None or self._x_adv.grad is None or self._delta is None:
            return
        threat, num = self.attack.threat, len(self._x_adv)
        ball = BALLS[threat.norm]
        radius = torch.full_like(self._x_adv[:, :1, :1, :1], threat.eps).detach()
        moved = self._delta[:num] + self.objective.step * radius * ball.ascend(
            self._x_adv.grad.nan_to_num(0.0, 0.0, 0.0)
        )
        self._delta[:num] = ball.project(moved, radius)
        self._x_adv = None

    def _delta_for(self, x: Tensor) -> Tensor:
        """The perturbation of a batch: of a smaller one the first part, of a larger one zeros behind what is known."""
        known = 0 if self._delta is None or self._delta.shape[1:] != x.shape[1:] else len(self._delta)
        if known < len(x):
            fresh = torch.zeros_like(x)
            if self._delta is not None and known:
                fresh[:known] = self._delta.to(x.device)
            self._delta = fresh
        assert self._delta is not None
        return self._delta[: len(x)]

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        delta = self._delta
        if delta is not None:  # where images were skipped, one process may not have had a full batch yet
            missing = processes.most(len(delta)) - len(delta)
            delta = processes.all_rows(torch.cat([delta, delta.new_zeros(missing, *delta.shape[1:])]))
        return {**super().state_dict(), "delta": delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        device = next(self.model.parameters()).device
        # a copy, since steps change it in place
        delta = state["delta"]
        self._delta = None if delta is None else processes.own_rows(delta).to(device, copy=True)
