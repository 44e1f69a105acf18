"""The live thing that a training loop talks to once a method is bound to a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.criticality.selection import Selection
from toughen.layers import ModelView
from toughen.rng import Share, generator
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput


class Live(ABC):
    """A method bound to a model: settings have become state, and a training loop can use it.

    In a loop: ``epoch_start`` once per epoch, then for each batch ``live(x, y).loss`` in the place of the old loss,
    ``backward``, the step of an optimizer over *all* ``live.parameters()`` (frozen ones have ``grad None``), and
    ``step_end``; after the last batch ``epoch_end``. ``deployed()`` is the network to keep.

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
        return self.on(Batch(x, y, index))

    def on(self, batch: Batch, *, share: Share | None = None) -> StepOutput:
        """Perturb a batch and return the loss on it, a scalar.

        Args:
            batch: The images at hand.
            share: Which rows of the whole batch they are: what is drawn at random for an image is the same whether its
                batch is in one piece or dealt out, to several processes or to parts that follow one another. None is
                this process's share, all of it where there is one process.
        """
        share = share or processes.share()
        draw = generator(self.seed, "attack", self.calls, device=batch.x.device, share=share)
        self.calls += share.index + processes.count() >= share.count  # the last part of a batch ends the call
        return self.loss(self.perturb(batch, generator=draw))

    # -- the step ---------------------------------------------------------------------------------

    @abstractmethod
    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Solve the inner maximisation at the current weights."""

    @abstractmethod
    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return the loss to minimise, differentiable in the trainable parameters."""

    @property
    def replays(self) -> int:
        """How many times in a row a batch is to be used, each with a step of the optimizer."""
        return 1

    def step_end(self) -> None:  # noqa: B027 - most methods have nothing to do
        """Take note that the optimizer has stepped."""

    # -- the epoch --------------------------------------------------------------------------------

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

    def epoch_end(self, images: Batches) -> None:  # noqa: B027
        """Do what is due after an epoch.

        Args:
            images: The training images without augmentation, to be read once at most, for methods that re-estimate
                batch-norm statistics; reading nothing costs nothing.
        """

    def finish(self, validation: Batches) -> None:  # noqa: B027
        """Do what is due after the last epoch, where a method has to choose on held-out images."""

    def deployed(self) -> nn.Module:
        """Return the network to evaluate and to keep: the model's architecture, perhaps with averaged weights."""
        return self.model

    # -- what the loop asks -----------------------------------------------------------------------

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

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return parameters, by name, that train with the model but are no part of it."""
        return {}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return all that an optimizer must hold, by name, whether it trains now or not."""
        own = {f"method.{name}": parameter for name, parameter in self.own_parameters().items()}
        return {**dict(self.model.named_parameters()), **own}

    def parameters(self) -> list[nn.Parameter]:
        """Return all that an optimizer must hold."""
        return list(self.named_parameters().values())

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that ask for a gradient now."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def release(self) -> None:  # noqa: B027 - most methods change nothing that would have to be given back
        """Give the model back as before binding: its own architecture, all of its parameters trainable."""

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which ``load_state_dict`` continues exactly.

        Of several processes all must ask, and all get the same: the state of the whole, whatever each of them holds.
        """
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; the model's weights are loaded before."""
        self.calls = state["calls"]
