"""Which modules count as layers, at each granularity, and which of them are odd; what ran comes from a trace."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import takewhile
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from toughen.layers.trace import Trace

Granularity = Literal["weights", "leaves", "blocks"]
Names = dict[nn.Module, str]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def weight_layers(model: nn.Module) -> Names:
    """Return the convolutions and linear maps, each under its first qualified name, in order of definition."""
    return {m: n for n, m in model.named_modules() if n and isinstance(m, _ConvNd | nn.Linear)}


def leaves(model: nn.Module) -> Names:
    """Return the modules without children that own parameters; what computes their weights is a part of them."""
    parametrized = (module for module in model.modules() if is_parametrized(module))
    inside = {part for module in parametrized for part in module.get_submodule("parametrizations").modules()}
    named = ((name, module) for name, module in model.named_modules() if name and module not in inside)
    return {m: n for n, m in named if inside.issuperset(m.children()) and any(True for _ in m.parameters())}


def holders(model: nn.Module) -> Names:
    """Return the modules that hold two or more convolutions or linear maps, and are no plain container."""
    weights = weight_layers(model)
    named = ((name, module) for name, module in model.named_modules() if name and type(module) not in _CONTAINERS)
    return {m: n for n, m in named if sum(child in weights for child in m.modules()) >= 2}


def blocks(model: nn.Module, trace: Trace, heads: Container[str]) -> Names:
    """Return the largest holders that are no stage and hold no classifier, and the layers outside of them.

    A stage is of a class that holds a sequence of two holders of one class: attention and MLP make a block, two blocks
    a stage. Attention and MLP are attributes, what repeats is in a sequence.

    Args:
        model: Any module.
        trace: Of the holders, among others: what is never called returns nothing and is no block.
        heads: Qualified names of the classifiers.
    """
    weights = weight_layers(model)
    held = {module: name for module, name in holders(model).items() if name in trace.calls}
    stages = {type(module) for module in held if any(_repeats(m, held) for m in module.modules())}
    ends = {module for module, name in weights.items() if name in heads}
    found: Names = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        if module in weights:
            found[module] = weights[module]
        elif module in held and type(module) not in stages and ends.isdisjoint(module.modules()):
            found[module] = held[module]
            inside.update(module.modules())
    return found


def _repeats(module: nn.Module, held: Names) -> bool:
    """Whether a module is a sequence, by class or because its children are of one class, of two holders alike."""
    children = list(module.children())
    if not isinstance(module, _CONTAINERS) and len({type(child) for child in children}) != 1:
        return False
    classes = Counter(type(child) for child in _through_containers(children) if child in held)
    return any(count >= 2 for count in classes.values())


def _through_containers(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) in _CONTAINERS:
            yield from _through_containers(module.children())
        else:
            yield module


def classifiers(trace: Trace, weights: Names) -> tuple[str, ...]:
    """Return the layers that return the logits: the last one that ran, if it has as many outputs as there are logits.

    With it those right before it that have its shape, [K, D] with D other than K: distilled models average two heads.

    Args:
        trace: Of the convolutions and linear maps, among others.
        weights: The convolutions and linear maps.
    """
    shapes = {name: _shape(module) for module, name in weights.items()}
    ran = [name for name in trace.calls if name in shapes][::-1]
    if not ran or shapes[ran[0]][0] != trace.num_logits:
        return ()
    last = shapes[ran[0]]
    return tuple(takewhile(lambda name: shapes[name] == last, ran)) if last[0] != last[1] else (ran[0],)


def gates(trace: Trace, weights: Names) -> tuple[str, ...]:
    """Return the layers whose output has one position although a later layer's has more, as in squeeze-excitation."""
    channels = {name: _shape(module)[0] for module, name in weights.items()}
    found: list[str] = []
    most = 1
    for name in reversed(tuple(trace.calls)):
        if name in channels and name in trace.num_features:
            positions = trace.num_features[name] // channels[name]
            if positions == 1 < most:
                found.append(name)
            most = max(most, positions)
    return tuple(found[::-1])


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Outputs, inputs and kernel; the weight itself may be computed at each access (parametrizations)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, _ConvNd)
    return module.out_channels, module.in_channels, *module.kernel_size


def shared(model: nn.Module, names: Names) -> tuple[tuple[str, ...], ...]:
    """Return groups of qualified names behind which stands the same module, or the same parameter."""
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


def other_weights(model: nn.Module, names: Names) -> tuple[str, ...]:
    """Return the parameters with two or more sides that no layer owns, for example of attention."""
    owned = {id(parameter) for module in names for parameter in module.parameters()}
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in owned and sum(side > 1 for side in parameter.shape) >= 2
    )
