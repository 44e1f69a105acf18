"""What a method and an objective are: settings, with the rules of what they go together with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toughen.attacks import Attack, CrossEntropy, Goal
from toughen.layers import ModelView
from toughen.objectives.live import Live
from toughen.registry import Registry
from toughen.types import AdversarialBatch, Batch, StepOutput

METHODS: Registry[Callable[..., Any]] = Registry("method")


class Method:
    """Settings of a training method, as a frozen dataclass. What it goes together with is data on its class.

    Attributes:
        label: Its name in a row label of the paper's tables.
        conflicts: Names of ``toughen list methods`` that it can't be stacked with, each with the reason and the fix.
        before: Names that must stand behind it where both are stacked, each with the reason.
        shapes_step: Whether it acts through ``perturb`` and ``loss`` alone, so that an outer method which has a loss
            of its own would silence it.
        reads_unlabelled: Whether it learns from images without a label (-1).
        needs_source: Whether batches must tell where augmentation moved each pixel from (``Batch.source``).
        needs_extra: Whether it makes no sense without extra images (``data.extra``).
        takes_parts: Whether a batch may come in parts whose gradients are added up.
        shards: Whether it trains a model whose weights are dealt out to several processes.
    """

    label: ClassVar[str]
    conflicts: ClassVar[Mapping[str, str]] = {}
    before: ClassVar[Mapping[str, str]] = {}
    shapes_step: ClassVar[bool] = False
    reads_unlabelled: ClassVar[bool] = False
    needs_source: ClassVar[bool] = False
    needs_extra: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = True
    shards: ClassVar[bool] = False

    def check_stack(self, methods: Sequence["Method"]) -> None:
        """Refuse settings that contradict those of the other methods in a stack.

        Raises:
            InputError: Names both methods and the fix.
        """


class Objective(Method, ABC):
    """Settings of an objective: the goal that a search for x' maximises, and the loss on x' that training minimises."""

    def goal(self) -> Goal:
        """Return what the search maximises."""
        return CrossEntropy()

    def search_start(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """Return where the search begins, [B, C, H, W]; None leaves it to the attack."""
        return batch.start

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Find the perturbed images to train on."""
        start = self.search_start(batch, generator)
        x_adv = attack(model, batch.x, batch.y, goal=self.goal(), start=start, generator=generator)
        return AdversarialBatch(batch, x_adv)

    @abstractmethod
    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the loss of a perturbed batch."""

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> Live:
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
