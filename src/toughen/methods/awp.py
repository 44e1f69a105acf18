"""AWP (Wu et al. 2020): the loss at the worst weights near the model's own, found by one gradient step per tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toughen import processes
from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.layers.substitutes import substitutes
from toughen.layers.taps import buffers_kept, random_state_kept
from toughen.methods.wrapper import InnerLoss, LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live
from toughen.types import AdversarialBatch, Batches, StepOutput

TINY = 1e-20  # of the official code: a tensor without gradient does not move


@METHODS.register("awp")
@dataclass(frozen=True, kw_only=True)
class AWP(Wrapper):
    """Adversarial weight perturbation: ``min over w of L(w + gamma * v)``, with v the worst direction at w.

    L is the inner method's loss on its perturbed batch, so ``stack(PGDAT(), AWP())`` is AT-AWP, ``stack(TRADES(),
    AWP(gamma=0.005, start_epoch=10))`` is TRADES-AWP. For each weight tensor k with gradient g_k of that loss,
    ``v_k = ||w_k|| / (||g_k|| + 1e-20) * g_k`` (Frobenius norms), a constant: the loss is differentiated at
    ``w + gamma * v``, its gradient is that of w.

    The official code makes v with a copy of the network and adds it to the weights in place, here both passes see
    substituted weights and nothing is written. It moves what has "weight" in its name and two dimensions or more, here
    that is every parameter of the model of two dimensions or more that trains now: position embeddings and LoRA's
    factors too, frozen layers not. Its optimizer steps at the moved weights, so weight decay sees them, which is
    ``decay`` here.

    Args:
        gamma: Length of the step relative to each tensor, >= 0; the paper's values are 0.005 to 0.01.
        start_epoch: Epochs that the inner method trains before without it.
        decay: The weight decay of SGD, to let it act on the moved weights as in the official code; 0 lets it act on the
            weights themselves. The difference is ``lr * decay * gamma * v`` per step.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "AWP"
    shapes_step: ClassVar[bool] = True

    gamma: float = 0.01
    start_epoch: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"awp {name} is {getattr(self, name)!r}; it must be a finite number >= 0")
        if self.start_epoch < 0:
            raise InputError(f"awp start_epoch is {self.start_epoch}; it must be >= 0")

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveAWP":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method.
        """
        return LiveAWP(self.around(inner), settings=self, seed=seed)


class LiveAWP(LiveWrapper):
    """AWP bound to a model."""

    def __init__(self, inner: Live, *, settings: AWP, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.epoch = 0
        self._inner_loss = InnerLoss(inner)

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Note the epoch; see ``Live.epoch_start``."""
        self.epoch = epoch
        return super().epoch_start(epoch, probe, optimizer=optimizer)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return the inner loss at the perturbed weights, differentiable in the weights themselves."""
        settings = self.settings
        weights = [w for w in self.model.parameters() if w.requires_grad and w.dim() > 1]
        if settings.gamma == 0 or self.epoch < settings.start_epoch or not weights:
            return self.inner.loss(adv)
        offsets = self._offsets(adv, weights)
        output = self._loss_at({w: w + offset for w, offset in offsets.items()}, adv)
        for w, offset in offsets.items() if settings.decay else ():
            decayed = settings.decay * (offset * w).sum()
            output.loss = output.loss + (decayed - decayed.detach())  # a gradient and no loss, as weight decay is
        return output

    def _offsets(self, adv: AdversarialBatch, weights: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """``gamma * v_k`` of each weight that the loss depends on."""
        # the pass that counts must meet the same dropout, and statistics must move once per step
        with buffers_kept(self.model), random_state_kept(self.model):
            gradients = torch.autograd.grad(self.inner.loss(adv).loss, weights, allow_unused=True)
        processes.average([gradient for gradient in gradients if gradient is not None])
        return {
            w: self.settings.gamma * w.detach().norm() / (gradient.norm() + TINY) * gradient
            for w, gradient in zip(weights, gradients, strict=True)
            if gradient is not None
        }

    def _loss_at(self, moved: Mapping[Tensor, Tensor], adv: AdversarialBatch) -> StepOutput:
        """The inner loss with other tensors in the place of some weights."""
        tensors = substitutes(self._inner_loss, moved)
        output: StepOutput = functional_call(self._inner_loss, tensors, (adv,), tie_weights=False)
        return output

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        return {**super().state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        self.epoch = state["epoch"]
