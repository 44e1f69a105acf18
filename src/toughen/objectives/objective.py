"""What an objective is, and the live thing that a training loop talks to once it is bound to a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.layers import ModelView
from toughen.registry import Registry
from toughen.rng import generator
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput

METHODS: Registry[Callable[..., Any]] = Registry("method")


class Live(ABC):
    """A method bound to a model: settings have become state, and a training loop can use it.

    In a loop: ``epoch_start`` once per epoch, then for each batch ``live(x, y).loss`` in the place of the old loss,
    ``backward`` and the step of an optimizer over *all* parameters of the model (frozen ones have ``grad None``).

    Args:
        model: The network; images in [0, 1] go in, logits come out.
        seed: Of the attacks' random starts; call number and seed together decide them.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        self.model = model
        self.view = ModelView(model)
        self.seed = seed
        self.calls = 0

    def __call__(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> StepOutput:
        """Perturb a batch and return the loss on it: x [B, C, H, W] in [0, 1], y [B]; ``loss`` is a scalar."""
        draw = generator(self.seed, "attack", self.calls, device=x.device)
        self.calls += 1
        return self.loss(self.perturb(Batch(x, y, index), generator=draw))

    @abstractmethod
    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Solve the inner maximisation at the current weights."""

    @abstractmethod
    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return the loss to minimise, differentiable in the trainable parameters."""

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Do what is due before epoch ``epoch`` (from 0); return the selection of layers if a new one was made.

        Args:
            epoch: Epochs done so far.
            probe: Training images without augmentation, as (x, y) pairs, for methods that measure something.
            optimizer: The loop's optimizer, for methods that drop stale momentum.
        """
        return None

    def check(self, example: Tensor) -> None:  # noqa: B027 - most methods fit every model
        """Look at one input [1, C, H, W] before training.

        Raises:
            InputError: These settings can't work with this model, for example ``k`` above its number of layers.
        """

    @property
    def selected(self) -> tuple[str, ...] | None:
        """Qualified names of the layers that train now; None while all do."""
        return None

    @property
    def lr_scale(self) -> float:
        """By what the scheduled learning rate is to be multiplied now."""
        return 1.0

    @property
    def schedule_start(self) -> int:
        """The epoch from which the learning-rate schedule is to be counted now."""
        return 0

    @property
    def probe_size(self) -> int:
        """How many images ``epoch_start`` would look at."""
        return 0

    def facts(self) -> dict[str, float]:
        """Return what belongs into the log of every epoch, for example CLAT's lambda."""
        return {}

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that ask for a gradient now."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def release(self) -> None:  # noqa: B027 - most methods change nothing that would have to be given back
        """Let all parameters train again, as before binding."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which ``load_state_dict`` continues exactly."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; the model's weights are loaded separately."""
        self.calls = state["calls"]


class Objective(ABC):
    """Settings of an objective, as a frozen dataclass. Subclasses say how to perturb and what to minimise."""

    label: ClassVar[str]

    @abstractmethod
    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Find the perturbed images to train on."""

    @abstractmethod
    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the loss of a perturbed batch."""

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> "LiveObjective":
        """Bind these settings to a model, for use in any training loop."""
        return LiveObjective(model, objective=self, attack=attack, seed=seed)


class LiveObjective(Live):
    """An objective bound to a model and an attack."""

    def __init__(self, model: nn.Module, *, objective: Objective, attack: Attack, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.objective = objective
        self.attack = attack

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """See ``Live.perturb``."""
        return self.objective.perturb(self.model, batch, self.attack, generator=generator)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """See ``Live.loss``."""
        return self.objective.loss(self.view, adv)
