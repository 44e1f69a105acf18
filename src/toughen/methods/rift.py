"""RiFT (Zhu et al. 2023): fine-tune the least robust-critical module on clean images, then go back part of the way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack
from toughen.criticality.module_robustness import module_robustness
from toughen.criticality.selection import Selection
from toughen.errors import InputError, check_choices
from toughen.layers import Layer, LayerMap, NormStats, TrainableSet, map_layers
from toughen.methods.averaging import ONE_NETWORK
from toughen.methods.clat import CLAT
from toughen.methods.interpolation import Interpolation, interpolated, measure_path
from toughen.methods.wrapper import LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live, Method
from toughen.objectives.cross_entropy import cross_entropy
from toughen.rng import stream_seed
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput

CHUNK = 128  # images of the probe that one step of the ascent sees


@METHODS.register("rift")
@dataclass(frozen=True, kw_only=True)
class RiFT(Wrapper):
    """Robust fine-tuning: minimise clean cross-entropy over the module that robustness depends on least.

    At ``start_epoch`` the module robust criticality of every convolution and linear map is measured on training images
    (see ``toughen.criticality.module_robustness``); from then on the module with the lowest one trains alone, on clean
    images, in the place of the inner method. ``finish`` takes ``theta(alpha) = (1 - alpha) theta_start + alpha
    theta_end`` for alpha = 0, 0.1, ..., 1, batch-norm statistics included, and deploys the one with the highest clean
    accuracy on validation images among those whose robust accuracy there is at most ``drop`` below that of alpha = 0
    (of equal ones the more robust, then the nearer to the start). It fine-tunes a trained network: start it late, or in
    a branch.

    Differences from the official code: it measures on test images and chooses on them, by the worst of three PGD-10
    runs; it finds modules by parts of their names, so some train together; it has an optimizer and a schedule of its
    own, of rate 0.001, where here the run's optimizer goes on without its momentum.

    Args:
        eps: Radius of the weight perturbation relative to the norm of the weight, > 0.
        mrc_epochs: Passes of its ascent, at least 1.
        samples: Training images to measure on, at least 1.
        start_epoch: Epochs that the inner method trains before.
        layer: Qualified name of the module to tune; None measures.
        drop: Robust accuracy that may be lost, in [0, 1]; 0.001 are 0.1 points.
        norm_stats: Batch-norm statistics while it tunes: ``"update"``, where all move, as in the official code;
            ``"follow"``, where only the batch norm behind the module moves; ``"frozen"``.
        lr: ``"continue"`` the schedule, or ``"restart"`` it at the first epoch of tuning. The loop applies it.
        lr_scale: Factor on the scheduled learning rate while it tunes, >= 0 (the official rate is a hundredth of that
            before). The loop applies it.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "RiFT"
    conflicts: ClassVar[Mapping[str, str]] = {
        "swa": ONE_NETWORK,
        "ema": ONE_NETWORK,
        "lora": "LoRA freezes the weights, one of which RiFT has to tune; leave one of the two out",
        "autolora": "RiFT learns clean images in one layer, AutoLoRA in adapters; leave one of the two out",
    }

    eps: float = 0.1
    mrc_epochs: int = 10
    samples: int = 1000
    start_epoch: int = 0
    layer: str | None = None
    drop: float = 0.001
    norm_stats: NormStats = "update"
    lr: Literal["continue", "restart"] = "continue"
    lr_scale: float = 0.01

    def __post_init__(self) -> None:
        check_choices(self, where="rift")
        for name in ("mrc_epochs", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"rift {name} is {getattr(self, name)}; it must be at least 1")
        if self.start_epoch < 0:
            raise InputError(f"rift start_epoch is {self.start_epoch}; it must be >= 0")
        if not 0 < self.eps < math.inf:
            raise InputError(f"rift eps is {self.eps!r}; it must be a finite number > 0, relative to the weight's norm")
        if not 0 <= self.drop <= 1:
            raise InputError(f"rift drop is {self.drop!r}; it must be in [0, 1], for example 0.001 for 0.1 points")
        if not 0 <= self.lr_scale < math.inf:
            raise InputError(f"rift lr_scale is {self.lr_scale!r}; it must be a finite number >= 0")

    def check_stack(self, methods: Sequence[Method]) -> None:
        """See ``Method.check_stack``."""
        place = methods.index(self)
        if place < len(methods) - 1:
            raise InputError(
                f"{self.label} stands before {methods[place + 1].label}, but it fine-tunes what the methods before it"
                " made: put it last"
            )
        for method in methods:
            if isinstance(method, CLAT) and method.start_epoch >= self.start_epoch:
                raise InputError(
                    f"{method.label} begins at epoch {method.start_epoch} and {self.label} at {self.start_epoch}, so"
                    f" CLAT would never act; set rift start_epoch > {method.start_epoch}"
                )

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveRiFT":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method.
        """
        return LiveRiFT(self.around(inner), settings=self, attack=attack, seed=seed)


class LiveRiFT(LiveWrapper):
    """RiFT bound to a model.

    Attributes:
        mrc: Module robust criticality by module, once it is measured.
        alpha: What ``finish`` chose; None before.
        path: The networks that it chose from.
    """

    def __init__(self, inner: Live, *, settings: RiFT, attack: Attack, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.attack = attack
        self.mrc: dict[str, float] = {}
        self.alpha: float | None = None
        self.path: tuple[Interpolation, ...] = ()
        self.trainable_set: TrainableSet | None = None
        self._asked = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._layer: Layer | None = None
        self._first_epoch: int | None = None
        self._start: dict[str, Tensor] = {}
        self._chosen: nn.Module | None = None

    # -- what trains ------------------------------------------------------------------------------

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Choose the module and freeze all others, when RiFT starts; see ``Live.epoch_start``.

        Raises:
            InputError: RiFT starts and ``probe`` is empty, or there is no such layer, or it is frozen.
        """
        if self._layer is None and epoch < self.settings.start_epoch:
            return super().epoch_start(epoch, probe, optimizer=optimizer)
        self.alpha, self.path, self._chosen = None, (), None  # of a run that goes on after its end
        if self._layer is None:
            layer = self._least_critical(list(_chunks(probe, self.settings.samples)))
            self._first_epoch = epoch
            self._start = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self._tune(layer)
            if optimizer is not None:
                optimizer.state.clear()  # momentum of another loss
        return None

    def _least_critical(self, probe: Sequence[tuple[Tensor, Tensor]]) -> Layer:
        if not probe:
            raise InputError(
                "RiFT has to choose a module but the probe is empty: pass some training images as (x, y) pairs"
            )
        layers, settings = self._map(probe[0][0]), self.settings
        if settings.layer is not None:
            return self._named(layers, settings.layer)
        report = module_robustness(
            self.model,
            probe,
            self.attack,
            eps=settings.eps,
            epochs=settings.mrc_epochs,
            layers=[layer for layer in layers if self._asked.intersection(layer.parameters)],
            seed=stream_seed(self.seed, "rift"),
        )
        report = processes.of_first(report)
        self.mrc = {row.name: row.mrc for row in report.rows}
        return layers.by_name(report.chosen.name)

    def _named(self, layers: LayerMap, name: str) -> Layer:
        layer = layers.by_name(name)
        if not self._asked.intersection(layer.parameters):
            raise InputError(f"rift layer {name!r} is frozen, so there is nothing to tune; name another, or none")
        return layer

    def _map(self, images: Tensor) -> LayerMap:
        return map_layers(self.model, images[:1].to(self._device))

    def _tune(self, layer: Layer) -> None:
        """Let this layer train alone; the inner methods, and what they froze, are done."""
        self.inner.release()
        self._layer = layer
        self.trainable_set = TrainableSet(self.model, norm_stats=self.settings.norm_stats)
        self.trainable_set.select([layer])
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Return the clean images themselves, once RiFT has started."""
        return super().perturb(batch, generator=generator) if self._layer is None else AdversarialBatch(batch, batch.x)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the clean images, once RiFT has started."""
        if self.trainable_set is None:
            return super().loss(adv)
        self.trainable_set.apply_mode()
        loss = cross_entropy(self.view(adv.batch.x), adv.batch.y)
        return StepOutput(loss, {"clean_ce": loss.detach()})

    def step_end(self) -> None:
        """See ``Live.step_end``."""
        if self._layer is None:
            super().step_end()

    def epoch_end(self, images: Batches) -> None:
        """See ``Live.epoch_end``."""
        if self._layer is None:
            super().epoch_end(images)

    # -- what is deployed -------------------------------------------------------------------------

    def finish(self, validation: Batches) -> None:
        """Choose the network between the start and the end of fine-tuning; see ``Live.finish``.

        Raises:
            InputError: There are no validation images to choose on.
        """
        if self._layer is None:
            super().finish(validation)
            return
        path = measure_path(self._copy(), self._start, validation, self.attack, seed=self.seed)
        self.path = processes.of_first(path)
        least = self.path[0].robust - self.settings.drop - 1e-9  # of accuracies that differ by rounding alone
        best = max((p for p in self.path if p.robust >= least), key=lambda p: (p.clean, p.robust, -p.alpha))
        self._choose(best.alpha)

    def _choose(self, alpha: float) -> None:
        self.alpha = alpha
        self._chosen = self._copy()
        self._chosen.load_state_dict(interpolated(self._start, self.model.state_dict(), alpha))

    def _copy(self) -> nn.Module:
        return deepcopy(self.model).eval().requires_grad_(True)

    def deployed(self) -> nn.Module:
        """Return the network that ``finish`` chose, in eval mode; before it the one that trains."""
        return super().deployed() if self._chosen is None else self._chosen

    # -- what the loop asks -----------------------------------------------------------------------

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        if self.settings.layer is not None:
            self._named(self._map(example), self.settings.layer)
        super().check(example)

    @property
    def replays(self) -> int:
        """See ``Live.replays``."""
        return super().replays if self._layer is None else 1

    @property
    def selected(self) -> tuple[str, ...] | None:
        """See ``Live.selected``."""
        return super().selected if self._layer is None else (self._layer.name,)

    @property
    def lr_scale(self) -> float:
        """See ``Live.lr_scale``."""
        return super().lr_scale if self._layer is None else self.settings.lr_scale

    @property
    def schedule_start(self) -> int:
        """See ``Live.schedule_start``."""
        if self.settings.lr == "restart" and self._first_epoch is not None:
            return self._first_epoch
        return super().schedule_start

    @property
    def probe_size(self) -> int:
        """See ``Live.probe_size``."""
        if self._layer is not None:
            return 0
        return max(1 if self.settings.layer else self.settings.samples, super().probe_size)

    def facts(self) -> dict[str, float]:
        """See ``Live.facts``; ``mrc`` is that of the module that is tuned, ``alpha`` is there after ``finish``."""
        if self._layer is None:
            return super().facts()
        measured = {"mrc": self.mrc[self._layer.name]} if self.mrc else {}
        return measured if self.alpha is None else {**measured, "alpha": self.alpha}

    def release(self) -> None:
        """See ``Live.release``."""
        if self.trainable_set is not None:
            self.trainable_set.restore()
        super().release()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``; holds the weights at the start of fine-tuning."""
        return {
            **super().state_dict(),
            "layer": None if self._layer is None else asdict(self._layer),
            "first_epoch": self._first_epoch,
            "start": self._start,
            "mrc": self.mrc,
            "alpha": self.alpha,
            "path": [tuple(point) for point in self.path],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``; freezes what was frozen."""
        if self.trainable_set is not None:
            self.trainable_set.restore()
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(True)
        self._layer, self.trainable_set, self.alpha, self._chosen = None, None, None, None
        super().load_state_dict(state)
        self._first_epoch, self.mrc = state["first_epoch"], dict(state["mrc"])
        self._start = {name: tensor.to(self._device) for name, tensor in state["start"].items()}
        self.path = tuple(Interpolation(*point) for point in state["path"])
        if state["layer"] is not None:
            self._tune(Layer(**{**state["layer"], "parameters": tuple(state["layer"]["parameters"])}))
        if state["alpha"] is not None:
            self._choose(state["alpha"])


def _chunks(probe: Batches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``count`` images of the probe in small batches, each a step of the ascent."""
    missing = count
    for x, y, *_ in probe:
        for start in range(0, min(len(x), missing), CHUNK):
            rows = slice(start, min(start + CHUNK, missing))
            yield x[rows], y[rows]
        missing -= len(x)
        if missing <= 0:
            return
