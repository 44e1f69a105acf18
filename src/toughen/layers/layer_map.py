"""Which layers a model has, in order of first execution; what is odd about them is reported, not guessed.

A layer is a convolution or a linear map that owns weights (methods: one layer is one ``Conv2d``; batch norm is
not a layer). Indices start at 0; the classifier comes last and is marked.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from toughen.errors import InputError, unknown
from toughen.layers.taps import buffers_kept, mode, random_state_kept, tap

Granularity = Literal["weights", "leaves", "blocks"]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        index: Position in order of first execution, from 0.
        name: Qualified name, as in ``model.named_modules()``.
        parameters: Qualified names of the parameters that the layer owns.
        num_parameters: How many numbers these are.
        num_features: N_i of Eq. 2, the elements of its output for one sample.
        num_inputs: The elements of its input for one sample.
        num_calls: How often one forward runs it; with 2 or more it has no single feature and no criticality.
        norm: Qualified name of the batch norm that directly takes its output, or None.
        classifier: Whether its output is the model's logits.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    num_parameters: int
    num_features: int
    num_inputs: int
    num_calls: int = 1
    norm: str | None = None
    classifier: bool = False


@dataclass(frozen=True)
class LayerMap(Sequence[Layer]):
    """The layers of a model in order of first execution, and what the map could not measure.

    Attributes:
        layers: What one forward ran, indexed from 0.
        unseen: Layers that own weights but were never called in the forward.
        tuples: Layers that do not return one tensor with the samples first; they get no index.
        shared: Groups of names that share a module or a weight.
        others: Modules that own weight matrices of their own without being layers (for example attention).
    """

    layers: tuple[Layer, ...]
    unseen: tuple[str, ...] = ()
    tuples: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    others: tuple[str, ...] = field(default=())

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, index: int | slice) -> Layer | tuple[Layer, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def repeated(self) -> tuple[str, ...]:
        """Names of the layers that one forward runs more than once."""
        return tuple(layer.name for layer in self if layer.num_calls > 1)

    @property
    def measurable(self) -> tuple[Layer, ...]:
        """The layers that have exactly one feature per forward."""
        return tuple(layer for layer in self if layer.num_calls == 1)

    @property
    def selectable(self) -> tuple[Layer, ...]:
        """The measurable layers without the classifier: those that CLAT chooses from by default."""
        return tuple(layer for layer in self.measurable if not layer.classifier)

    def by_name(self, name: str) -> Layer:
        """Return the layer with this qualified name.

        Raises:
            InputError: There is none; the message names the nearest one.
        """
        for layer in self:
            if layer.name == name:
                return layer
        raise unknown("layer", name, (layer.name for layer in self), hint="see `toughen list layers MODEL`")

    def notes(self) -> list[str]:
        """Say in one line each what is odd: repeated, unseen, tuple-valued, shared and other weights."""
        groups = (
            ("runs more than once per forward, so has no single feature", self.repeated),
            ("owns weights but was never called in the forward", self.unseen),
            ("does not return one tensor with the samples first, so has no feature", self.tuples),
            ("share a module or a weight, so train together", tuple(" = ".join(g) for g in self.shared)),
            ("owns weights outside convolutions and linear maps, so is not measured", self.others),
        )
        return [f"{name}: {what}" for what, names in groups for name in names]


def map_layers(
    model: nn.Module,
    example: Tensor,
    *,
    granularity: Granularity = "weights",
    exclude: Sequence[str] = (),
) -> LayerMap:
    """List the layers that one forward of ``example`` runs, in order of first execution.

    Args:
        model: Any module; run once in eval mode without gradients and left as found.
        example: [B, ...], a valid input; one sample is enough.
        granularity: ``"weights"``: convolutions and linear maps (the paper's numbering). ``"leaves"``: every module
            without children that owns parameters, batch norm included. ``"blocks"``: the innermost modules that
            hold two or more convolutions or linear maps, and what stands outside of these on its own.
        exclude: Shell patterns of qualified names to leave out, for example ``"*.shortcut.*"``.

    Returns:
        The map; indices count what remains after ``exclude``.

    Raises:
        InputError: Nothing that owns weights ran, or a pattern matches no layer.
    """
    candidates = _candidates(model, granularity)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in candidates.values()):
            raise unknown(
                "layer pattern", pattern, candidates.values(), hint="a pattern matches whole names, * anything"
            )
    names = {m: n for m, n in candidates.items() if not any(fnmatchcase(n, pattern) for pattern in exclude)}
    trace = _Trace(model, names)
    trace.run(torch.cat([example[:1], example[:1]]))  # two samples tell what depends on the batch
    calls = Counter(trace.order)
    tuples = tuple(dict.fromkeys(trace.tuples))
    executed = [name for name in dict.fromkeys(trace.order) if name not in tuples]
    if not executed:
        raise InputError(f"the model {type(model).__name__} ran no layer that owns weights; nothing to analyse")
    owners = {name: module for module, name in names.items()}
    layers = []
    for index, name in enumerate(executed):
        parameters = {f"{name}.{p}" if name else p: v for p, v in owners[name].named_parameters()}
        layers.append(
            Layer(
                index=index,
                name=name,
                parameters=tuple(parameters),
                num_parameters=sum(value.numel() for value in parameters.values()),
                num_features=trace.num_features[name],
                num_inputs=trace.num_inputs[name],
                num_calls=calls[name],
                norm=trace.norm_of.get(name),
                classifier=index == len(executed) - 1 and trace.is_classifier(owners[name]),
            )
        )
    return LayerMap(
        layers=tuple(layers),
        unseen=tuple(name for name in names.values() if name not in calls),
        tuples=tuples,
        shared=_shared(model, names),
        others=_other_owners(model, candidates) if granularity == "weights" else (),
    )


class _Trace:
    """One forward, written down: who ran, with how many elements, and which norm took whose output."""

    def __init__(self, model: nn.Module, names: dict[nn.Module, str]) -> None:
        self.model, self.names = model, names
        self.order: list[str] = []
        self.tuples: list[str] = []
        self.num_features: dict[str, int] = {}
        self.num_inputs: dict[str, int] = {}
        self.norm_of: dict[str, str] = {}
        self.num_logits: int | None = None
        self.num_samples = 1
        self._outputs: dict[str, Tensor] = {}

    def run(self, example: Tensor) -> None:
        self.num_samples = len(example)
        norms = [name for name, module in self.model.named_modules() if isinstance(module, _NormBase)]
        with (
            torch.no_grad(),
            mode(self.model, training=False),
            buffers_kept(self.model),
            random_state_kept(self.model),
            tap(self.model, norms, self._see_norm, side="input"),
            tap(self.model, self.names.values(), self._see_input, side="input"),
            tap(self.model, self.names.values(), self._see_output),
        ):
            logits = self.model(example)
        if isinstance(logits, Tensor):
            self.num_logits = logits.shape[-1]

    def is_classifier(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and weight.dim() >= 2 and weight.shape[0] == self.num_logits

    def _see_input(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.num_inputs.setdefault(name, value[0].numel())

    def _see_output(self, name: str, value: Any) -> None:
        self.order.append(name)
        if not isinstance(value, Tensor) or value.shape[:1] != (self.num_samples,):
            self.tuples.append(name)
            return
        self.num_features.setdefault(name, value[0].numel())
        self.num_inputs.setdefault(name, 0)
        self._outputs[name] = value

    def _see_norm(self, norm: str, value: Any) -> None:
        for name, output in self._outputs.items():
            if output is value:
                self.norm_of.setdefault(name, norm)


def _candidates(model: nn.Module, granularity: Granularity) -> dict[nn.Module, str]:
    """Modules that count as layers, each under its first qualified name, in order of definition."""
    named = [(name, module) for name, module in model.named_modules() if name]
    weights: dict[nn.Module, str] = {module: name for name, module in named if isinstance(module, _ConvNd | nn.Linear)}
    if granularity == "weights":
        return weights
    if granularity == "leaves":
        return {m: n for n, m in named if not list(m.children()) and any(True for _ in m.parameters())}
    holds = {module: sum(child in weights for child in module.modules()) for _, module in named}
    blocks = {
        module: name
        for name, module in named
        if holds[module] >= 2 and not any(c is not module and holds.get(c, 0) >= 2 for c in module.modules())
    }
    inside = {child for block in blocks for child in block.modules()}
    return blocks | {module: name for module, name in weights.items() if module not in inside}


def _shared(model: nn.Module, names: dict[nn.Module, str]) -> tuple[tuple[str, ...], ...]:
    """Groups of qualified names behind which stands the same module, or the same parameter."""
    of_module: dict[int, list[str]] = {}
    of_weight: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            of_module.setdefault(id(module), []).append(name)
    for module, name in names.items():
        for parameter in module.parameters():
            of_weight.setdefault(id(parameter), []).append(name)
    groups = [tuple(group) for group in (*of_module.values(), *of_weight.values()) if len(group) > 1]
    return tuple(dict.fromkeys(groups))


def _other_owners(model: nn.Module, names: dict[nn.Module, str]) -> tuple[str, ...]:
    return tuple(
        name or type(model).__name__
        for name, module in model.named_modules()
        if module not in names and any(p.dim() >= 2 for p in module.parameters(recurse=False))
    )
