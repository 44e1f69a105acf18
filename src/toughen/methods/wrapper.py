"""Methods that wrap another one: their settings, and the live form that passes on whatever it does not change."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.objectives import Live, Method
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput


class Wrapper(Method, ABC):
    """Settings that bind to a model around an inner live method."""

    @property
    def needs_inner(self) -> str | None:
        """Why it can't stand alone, or None if it can."""
        return "it only changes the training of another method"

    def around(self, inner: Live | None) -> Live:
        """Return the inner method.

        Raises:
            InputError: There is none.
        """
        if inner is None:
            name = type(self).__name__
            raise InputError(f"{self.label} stands alone but {self.needs_inner}; use stack(PGDAT(), {name}(...))")
        return inner

    @abstractmethod
    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> Live:
        """Bind these settings to a model.

        Args:
            model: The network.
            attack: Finds the perturbations.
            inner: What is wrapped, bound to the same model.
            seed: Of all that is drawn at random.

        Raises:
            InputError: It can't stand alone, and ``inner`` is None.
        """


class LiveWrapper(Live):
    """Does what its inner method does. Subclasses override only what they change, and call ``super()`` for the rest."""

    def __init__(self, inner: Live, *, seed: int = 0) -> None:
        super().__init__(inner.model, seed=seed)
        self.inner = inner

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """See ``Live.perturb``."""
        return self.inner.perturb(batch, generator=generator)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """See ``Live.loss``."""
        return self.inner.loss(adv)

    @property
    def replays(self) -> int:
        """See ``Live.replays``."""
        return self.inner.replays

    def step_end(self) -> None:
        """See ``Live.step_end``."""
        self.inner.step_end()

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """See ``Live.epoch_start``."""
        return self.inner.epoch_start(epoch, probe, optimizer=optimizer)

    def epoch_end(self, images: Batches) -> None:
        """See ``Live.epoch_end``."""
        self.inner.epoch_end(images)

    def finish(self, validation: Batches) -> None:
        """See ``Live.finish``."""
        self.inner.finish(validation)

    def deployed(self) -> nn.Module:
        """See ``Live.deployed``."""
        return self.inner.deployed()

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        self.inner.check(example)

    @property
    def selected(self) -> tuple[str, ...] | None:
        """See ``Live.selected``."""
        return self.inner.selected

    @property
    def lr_scale(self) -> float:
        """See ``Live.lr_scale``."""
        return self.inner.lr_scale

    @property
    def schedule_start(self) -> int:
        """See ``Live.schedule_start``."""
        return self.inner.schedule_start

    @property
    def probe_size(self) -> int:
        """See ``Live.probe_size``."""
        return self.inner.probe_size

    def facts(self) -> dict[str, float]:
        """See ``Live.facts``."""
        return self.inner.facts()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """See ``Live.own_parameters``."""
        return self.inner.own_parameters()

    def release(self) -> None:
        """See ``Live.release``."""
        self.inner.release()

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        self.inner.load_state_dict(state["inner"])


class InnerLoss(nn.Module):
    """The inner loss as a module around the model, so that ``functional_call`` can give it other tensors."""

    def __init__(self, inner: Live) -> None:
        super().__init__()
        self.model = inner.model
        self.inner = inner

    def forward(self, adv: AdversarialBatch) -> StepOutput:
        """Return ``inner.loss(adv)``."""
        return self.inner.loss(adv.elsewhere())
