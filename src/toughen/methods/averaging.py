"""Weight averaging: SWA once per epoch, EMA once per step. The average is what is kept; training never sees it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

from toughen import processes
from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError, check_choices
from toughen.layers import has_local_norms
from toughen.layers.synced_norms import is_synchronised
from toughen.layers.taps import random_state_kept
from toughen.methods.wrapper import LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live
from toughen.rng import stream_seed
from toughen.types import Batches

ONE_NETWORK = "both say which network is evaluated; leave one out"


@dataclass(frozen=True, kw_only=True)
class _Averaging(Wrapper, ABC):
    """What both averages share: when they begin, and where their batch-norm statistics come from."""

    start_epoch: int = 0
    norm_stats: Literal["reestimate", "copy"] = "reestimate"

    def __post_init__(self) -> None:
        name = self.label.lower()
        check_choices(self, where=name)
        if self.start_epoch < 0:
            raise InputError(f"{name} start_epoch is {self.start_epoch}; it must be >= 0")

    @abstractmethod
    def share(self, count: int) -> float:
        """Return what share of the next average, in [0, 1], is that of the ``count`` networks so far."""


@METHODS.register("swa")
@dataclass(frozen=True, kw_only=True)
class SWA(_Averaging):
    """Stochastic weight averaging: the equal mean of the weights at the ends of epochs.

    ``average = (n * average + w) / (n + 1)`` after each epoch that counts, the n-th from 0. Attacks and updates see
    the current weights only. ``stack(PGDAT(), SWA())`` is the paper's row SWAAT.

    Chen et al. weigh each batch of the re-estimation by its size; here batches smaller than the first are left out.

    Args:
        start_epoch: Epochs before the first one at whose end weights are averaged (Chen et al.: 55 of 200).
        norm_stats: Batch-norm statistics of the average: ``"reestimate"`` them in one pass over clean training images
            after each averaged epoch, or ``"copy"`` those of the current model.
        every: Epochs between two averaged ones.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "SWA"
    conflicts: ClassVar[Mapping[str, str]] = {"ema": ONE_NETWORK, "rift": ONE_NETWORK}

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"swa every is {self.every}; it must be at least 1 epoch")

    def share(self, count: int) -> float:
        """Return ``count / (count + 1)``."""
        return count / (count + 1)

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveSWA":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method.
        """
        return LiveSWA(self.around(inner), settings=self, seed=seed)


@METHODS.register("ema")
@dataclass(frozen=True, kw_only=True)
class EMA(_Averaging):
    """Exponential moving average of the weights, after every step of the optimizer.

    ``average = d * average + (1 - d) * w``, with ``d = min(decay, (1 + t) / (10 + t))`` in the step t from the start
    of averaging (Gowal et al. 2020; Rebuffi et al. 2021). The first step copies. Ports of that code mix a tenth of the
    weights before it in, which is soon forgotten.

    Args:
        start_epoch: Epochs before the first averaged step; until then the model itself is kept.
        norm_stats: Buffers of the average: ``"copy"`` those of the current model at every step, or, after each epoch,
            ``"reestimate"`` batch-norm statistics in one pass over clean training images.
        decay: The largest d, in [0, 1); 0 keeps the current weights.
        warmup: ``"gowal"``, as above; ``"none"`` is d = decay at once.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "EMA"
    conflicts: ClassVar[Mapping[str, str]] = {"swa": ONE_NETWORK, "rift": ONE_NETWORK}

    norm_stats: Literal["reestimate", "copy"] = "copy"
    decay: float = 0.995
    warmup: Literal["gowal", "none"] = "gowal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise InputError(f"ema decay is {self.decay!r}; it must be in [0, 1), for example 0.995")

    def share(self, count: int) -> float:
        """Return d in step t = ``count``."""
        return self.decay if self.warmup == "none" else min(self.decay, (1 + count) / (10 + count))

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveEMA":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method.
        """
        return LiveEMA(self.around(inner), settings=self, seed=seed)


class _LiveAverage(LiveWrapper):
    """An average of what the inner method would deploy, so adapters enter it as the plain weights they amount to."""

    def __init__(self, inner: Live, *, settings: _Averaging, seed: int) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.average: nn.Module | None = None
        self.count = 0  # a number of Python's own: torch's AveragedModel sends its counter to the device at each update
        self.epoch = 0

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Note the epoch; see ``Live.epoch_start``."""
        self.epoch = epoch
        return super().epoch_start(epoch, probe, optimizer=optimizer)

    def deployed(self) -> nn.Module:
        """Return the average in eval mode, once there is one."""
        return super().deployed() if self.average is None else self.average

    def _update(self) -> None:
        """Take the weights of now into the average, and their buffers in the place of its own."""
        network = self.inner.deployed()
        if self.average is None:
            self.average = _twin(network)
        else:
            move = get_ema_multi_avg_fn(self.settings.share(self.count))  # type: ignore[no-untyped-call]
            move(list(self.average.parameters()), list(network.parameters()), self.count)
            for kept, current in zip(self.average.buffers(), network.buffers(), strict=True):
                kept.copy_(current)
        self.count += 1

    def _reestimate(self, images: Batches) -> None:
        """Give the average the batch-norm statistics of its own features, if it has batch norm."""
        average = self.average
        if average is None or self.settings.norm_stats == "copy" or not _has_statistics(average):
            return
        with random_state_kept(average):
            torch.manual_seed(stream_seed(self.seed, "norm statistics", self.epoch))  # dropout is on in this pass
            alike = _alike(images, self.settings.label)
            if is_synchronised(average):  # all processes have the same images here
                alike = (processes.own_rows(x) for x in alike)
            update_bn(alike, average, device=next(average.parameters()).device)
        if is_synchronised(average) and has_local_norms(average):  # as after each update
            processes.average([buffer for buffer in average.buffers() if buffer.is_floating_point()])

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        average = None if self.average is None else self.average.state_dict()
        return {**super().state_dict(), "average": average, "count": self.count, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        self.count, self.epoch, self.average = state["count"], state["epoch"], None
        if state["average"] is not None:
            self.average = _twin(self.inner.deployed())
            self.average.load_state_dict(state["average"])


class LiveSWA(_LiveAverage):
    """SWA bound to a model."""

    settings: SWA

    def epoch_end(self, images: Batches) -> None:
        """Average the weights of this epoch, if it counts; see ``Live.epoch_end``."""
        super().epoch_end(images)
        since = self.epoch - self.settings.start_epoch
        if since >= 0 and since % self.settings.every == 0:
            self._update()
            self._reestimate(images)


class LiveEMA(_LiveAverage):
    """EMA bound to a model."""

    def step_end(self) -> None:
        """Average the weights of this step; see ``Live.step_end``."""
        super().step_end()
        if self.epoch >= self.settings.start_epoch:
            self._update()

    def epoch_end(self, images: Batches) -> None:
        """Re-estimate batch-norm statistics, if that is wanted; see ``Live.epoch_end``."""
        super().epoch_end(images)
        self._reestimate(images)


def _twin(network: nn.Module) -> nn.Module:
    """A copy in eval mode, all of whose parameters may train later, whatever is frozen now."""
    return deepcopy(network).eval().requires_grad_(True)


def _has_statistics(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in network.modules())


def _alike(images: Batches, label: str) -> Iterator[Tensor]:
    """The images of batches as large as the first: all count alike, so a smaller last one would weigh too much."""
    size = 0
    for x, *_ in images:
        size = size or len(x)
        if len(x) == size:
            yield x
    if not size:
        raise InputError(
            f"{label} re-estimates batch-norm statistics after an epoch but got no images: pass the training images to"
            " epoch_end, or set norm_stats='copy'"
        )
