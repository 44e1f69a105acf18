"""Which layers a model has, in order of first execution; what is odd about them is reported, not guessed.

A layer is a convolution or a linear map that owns weights (methods: one layer is one ``Conv2d``; batch norm is
not a layer). Indices start at 0; the classifier comes last and is marked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import overload

from torch import Tensor, nn

from toughen.errors import InputError, unknown
from toughen.layers.candidates import (
    Granularity,
    Names,
    blocks,
    classifiers,
    gates,
    holders,
    leaves,
    other_weights,
    shared,
    weight_layers,
)
from toughen.layers.trace import Trace


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        index: Position in order of first execution, from 0.
        name: Qualified name, as in ``model.named_modules()``.
        parameters: Qualified names of the parameters that the layer owns.
        num_parameters: How many numbers these are.
        num_features: N_i of Eq. 2, the elements of its output for one sample.
        num_inputs: The elements of its input for one sample; 0 if that is no tensor with the samples first.
        num_calls: How often one forward runs it; with 2 or more it has no single feature and no criticality.
        norm: Qualified name of the batch norm that directly takes its output, and nothing else's, or None.
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
        others: Parameters with two or more sides that no layer owns (for example of attention).
        repeated_norms: Batch norms that run more than once per forward, so are no layer's own.
        gates: Layers whose output has one position although a later layer's has more (for example squeeze-excitation).
    """

    layers: tuple[Layer, ...]
    unseen: tuple[str, ...] = ()
    tuples: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    others: tuple[str, ...] = ()
    repeated_norms: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()

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
        """Say in one line each what is odd: repeated, unseen, tuple-valued, shared and other weights; gates in one."""
        groups = (
            ("runs more than once per forward, so has no single feature", self.repeated),
            ("owns weights but was never called in the forward", self.unseen),
            ("does not return one tensor with the samples first, so has no feature", self.tuples),
            ("share a module or a weight, so train together", tuple(" = ".join(g) for g in self.shared)),
            ("is a weight that belongs to no layer, so is not measured", self.others),
            ("runs more than once per forward, so belongs to no layer", self.repeated_norms),
        )
        notes = [f"{name}: {what}" for what, names in groups for name in names]
        if self.gates:
            more = len(self.gates) - 2
            some = ", ".join(self.gates[:2]) + (f" and {more} more" if more > 0 else "")
            what = "one position each where later layers have more, as in squeeze-excitation"
            notes.append(f"{some}: {what}; 1/N favours them, see exclude")
        return notes


def map_layers(
    model: nn.Module,
    example: Tensor,
    *,
    granularity: Granularity = "weights",
    exclude: Sequence[str] = (),
) -> LayerMap:
    """List the layers that one forward of ``example`` runs, in order of first execution.

    A layer may return [B * w, ...], as the windows of a Swin transformer do: it has a feature if it is seen that the w
    rows of a sample follow each other. Any other first dimension is reported, and the layer gets no index.

    Args:
        model: Any module; run in eval mode without gradients, once or twice, and left as found.
        example: [B, ...], a valid input in [0, 1]; one sample is enough.
        granularity: ``"weights"``: convolutions and linear maps (the paper's numbering). ``"leaves"``: every module
            without children that owns parameters, batch norm included. ``"blocks"``: the largest modules that hold
            two or more convolutions or linear maps, but neither the classifier nor a sequence of two such modules of
            one class (these are stages); what stands outside of them counts on its own. A sequence is a ``Sequential``,
            ``ModuleList`` or ``ModuleDict``, which are no blocks themselves, or has children of one class alone.
        exclude: Shell patterns of qualified names to leave out, for example ``"*.shortcut.*"``.

    Returns:
        The map; indices count what remains after ``exclude``.

    Raises:
        InputError: Nothing that owns weights ran, or a pattern matches no layer.
    """
    weights = weight_layers(model)
    candidates = {"weights": weights, "leaves": leaves(model), "blocks": holders(model)}[granularity]
    trace = Trace(model, {**candidates, **weights}.values(), example)
    heads = classifiers(trace, weights)
    if granularity == "blocks":
        candidates = blocks(model, trace, heads)
    names = _without(candidates, exclude)
    layers = _layers(names, trace, heads)
    if not layers:
        raise InputError(f"the model {type(model).__name__} ran no layer that owns weights; nothing to analyse")
    called = [name for name in names.values() if name in trace.calls]
    norms = (trace.norm_of.get(layer.name) for layer in layers)
    return LayerMap(
        layers=layers,
        unseen=tuple(name for name in names.values() if name not in trace.calls),
        tuples=tuple(name for name in called if name not in trace.num_features),
        shared=shared(model, names),
        others=other_weights(model, candidates),
        repeated_norms=tuple(dict.fromkeys(norm for norm in norms if norm and trace.norm_calls[norm] > 1)),
        gates=tuple(name for name in gates(trace, weights) if name in called),
    )


def _without(candidates: Names, exclude: Sequence[str]) -> Names:
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in candidates.values()):
            raise unknown(
                "layer pattern", pattern, candidates.values(), hint="a pattern matches whole names, * anything"
            )
    return {m: n for m, n in candidates.items() if not any(fnmatchcase(n, pattern) for pattern in exclude)}


def _layers(names: Names, trace: Trace, heads: Sequence[str]) -> tuple[Layer, ...]:
    owners = {name: module for module, name in names.items()}
    executed = [name for name in trace.calls if name in owners and name in trace.num_features]
    layers = []
    for index, name in enumerate(executed):
        parameters = {f"{name}.{p}": value for p, value in owners[name].named_parameters()}
        norm = trace.norm_of.get(name)
        layers.append(
            Layer(
                index=index,
                name=name,
                parameters=tuple(parameters),
                num_parameters=sum(value.numel() for value in parameters.values()),
                num_features=trace.num_features[name],
                num_inputs=trace.num_inputs.get(name, 0),
                num_calls=trace.calls[name],
                norm=norm if norm and trace.norm_calls[norm] == 1 else None,
                classifier=name in heads,
            )
        )
    return tuple(layers)
