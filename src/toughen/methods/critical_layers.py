"""The layers that CLAT trains: when they are chosen, from what, and what is frozen meanwhile (Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack
from toughen.criticality import CriticalityOptions, CriticalityReport, analyze
from toughen.criticality.selection import Selection, SelectionRule
from toughen.errors import InputError
from toughen.layers import Layer, LayerMap, NormStats, TrainableSet, map_layers
from toughen.rng import generator, stream_seed


@dataclass(kw_only=True)
class CriticalLayers:
    """The choice of layers of a model, from none to one after another; see ``CLAT`` for the settings.

    Args:
        model: The network.
        attack: Finds the perturbations that the index is measured on.
        seed: Of their random starts, and of random selection.
        rule: Chooses from a report.
        k: How many; None is 5 % of the layers, at least 1, or as many as are ``named``.
        named: Those that a fixed rule names.
        classifier: Whether it may be chosen.
        start_epoch: When the first choice is due.
        every: Epochs from one to the next; None makes a single one.
        criticality: How the index is measured.
        norm_stats: See ``TrainableSet``.
        norm_affine: See ``TrainableSet``.

    Attributes:
        layers: The choice; empty before the first.
        first_epoch: When the first was made; None before.
    """

    model: nn.Module
    attack: Attack
    seed: int
    rule: SelectionRule
    k: int | None
    named: tuple[str, ...]
    classifier: bool
    start_epoch: int
    every: int | None
    criticality: CriticalityOptions
    norm_stats: NormStats
    norm_affine: Literal["frozen", "follow"]
    layers: tuple[Layer, ...] = field(default=(), init=False)
    first_epoch: int | None = field(default=None, init=False)
    _map: LayerMap | None = field(default=None, init=False)
    _set: TrainableSet | None = field(default=None, init=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Their qualified names, the first choice first."""
        return tuple(layer.name for layer in self.layers)

    def check(self, example: Tensor) -> None:
        """Look at one input [1, C, H, W] before training.

        Raises:
            InputError: There are fewer than ``k`` layers, or a named one can't be chosen.
        """
        layers = self._mapped(example)
        available = len(layers.measurable if self.classifier else layers.selectable)
        if self.k is not None and self.k > available:
            raise InputError(
                f"clat k is {self.k}; {type(self.model).__name__} has {available} layers "
                f"to choose from, so k must be 1 to {available}"
            )
        for name in self.named:
            if layers.by_name(name).num_calls > 1:
                raise InputError(
                    f"layer {name!r} runs more than once per forward, so it can't be selected; name another"
                )

    def due(self, epoch: int) -> bool:
        """Whether a choice is to be made before this epoch, from 0."""
        if self.first_epoch is None:
            return epoch >= self.start_epoch
        return self.every is not None and (epoch - self.first_epoch) % self.every == 0

    def choose(self, images: tuple[Tensor, Tensor], epoch: int) -> Selection:
        """Measure all layers, choose among them, and freeze all others.

        Args:
            images: x [N, C, H, W] and y [N], to measure on.
            epoch: Epochs done so far.

        Raises:
            InputError: A named layer has nothing to train, or ``k`` is larger than the number of layers that have.
        """
        layers = self._mapped(images[0])
        report = self._measured(layers, images, epoch)
        k = self.k or len(self.named) or max(1, round(0.05 * len(layers.selectable)))
        draw = generator(self.seed, "select", epoch)
        names = self.rule(self._trainable_rows(layers, report), k, classifier=self.classifier, generator=draw)
        self._train(tuple(layers.by_name(name) for name in names))
        processes.check_agree(names, "which layers are the most critical")
        if self.first_epoch is None:
            self.first_epoch = epoch
        return Selection(epoch, names, report)

    def apply_mode(self) -> None:
        """See ``TrainableSet.apply_mode``."""
        self._trainable_set().apply_mode()

    def release(self) -> None:
        """Let train what trained before the first choice."""
        if self._set is not None:
            self._set.restore()

    def _mapped(self, images: Tensor) -> LayerMap:
        if self._map is None:
            device = next(self.model.parameters()).device
            self._map = map_layers(
                self.model,
                images[:1].to(device),
                granularity=self.criticality.granularity,
                exclude=self.criticality.exclude,
            )
        return self._map

    def _measured(self, layers: LayerMap, images: tuple[Tensor, Tensor], epoch: int) -> CriticalityReport:
        mine = (processes.own_rows(images[0]), processes.own_rows(images[1]))
        seed = stream_seed(self.seed, "selection attack", epoch)
        return analyze(self.model, [mine], attack=self.attack, layers=layers, options=self.criticality, seed=seed)

    def _trainable_rows(self, layers: LayerMap, report: CriticalityReport) -> CriticalityReport:
        """The rows of layers with something to train: frozen neither by the user nor, without adapter, by LoRA."""
        trains = self._trainable_set().may_train
        for name in self.named:
            if not trains(layers.by_name(name)):
                raise InputError(
                    f"clat layer {name!r} is frozen before CLAT selects it (LoRA freezes layers without an adapter), so"
                    " nothing would train; name another"
                )
        return replace(report, rows=tuple(row for row in report.rows if trains(layers.by_name(row.name))))

    def _train(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers
        self._trainable_set().select(layers)

    def _trainable_set(self) -> TrainableSet:
        if self._set is None:  # only now: what an inner method has frozen for good stays frozen
            self._set = TrainableSet(self.model, norm_stats=self.norm_stats, norm_affine=self.norm_affine)
        return self._set

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"first_epoch": self.first_epoch, "selected": [asdict(layer) for layer in self.layers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; what was frozen is frozen, and what the model froze before it stays so."""
        self.first_epoch = state["first_epoch"]
        layers = tuple(Layer(**{**layer, "parameters": tuple(layer["parameters"])}) for layer in state["selected"])
        if layers:
            self._train(layers)
        else:
            self.layers = ()

    def forget(self) -> None:
        """Release the model, and let the next choice take anew what may train at all."""
        self.release()
        self._set = None
