"""Batch norm in eval mode is an affine map: here it becomes part of the convolution before it, for a while."""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from toughen.layers.synced_norms import SyncedBatchNorm
from toughen.layers.taps import buffers_kept, mode, random_state_kept, tap

# exactly these: a subclass may do more in its forward, as timm's norms do with their activation
_LINEAR_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncedBatchNorm)

Pair = tuple[str, str]  # qualified names: the convolution (or linear map), and the batch norm that takes its output

FOLDED: WeakSet[nn.Module] = WeakSet()  # layers whose output is, at the moment, that of the norm behind them

_known: WeakKeyDictionary[nn.Module, tuple[list[nn.Module], tuple[Pair, ...]]] = WeakKeyDictionary()


@contextmanager
def norms_folded(model: nn.Module, example: Tensor, *, keep: Collection[str] = ()) -> Iterator[None]:
    """Inside the ``with``, each batch norm in eval mode is computed by the convolution whose output it alone takes.

    ``W' = W * scale / std`` and ``b' = (b - mean) * scale / std + shift``, per channel, in the weights' precision and
    differentiable in all of them; under autocast they are cast once, here. Outputs are equal up to rounding, with
    fewer passes over activations and none kept for the norm. Batch norms in train mode, without running statistics, or
    whose convolution's output goes elsewhere too stay as they are, and so do modules that carry hooks.

    Args:
        model: Any module; the same after the ``with``. Its forward must not choose its way by the images' content.
        example: [B, ...] images; two of them show, once for each model, which batch norm follows which layer.
        keep: Qualified names of layers whose own output will be looked at.
    """
    modules = dict(model.named_modules())
    foldable = any(type(module) in _NORMS and not module.training for module in modules.values())
    undo: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
    try:
        for name, norm_name in _pairs(model, example) if foldable else ():
            layer, norm = modules[name], modules[norm_name]
            free = not (layer in FOLDED or norm.training or _has_hooks(layer) or _has_hooks(norm))
            if not free or {name, norm_name} & set(keep):
                continue
            weight, bias = _folded(layer, norm)
            undo.append((layer, norm, dict(layer._parameters)))
            layer._parameters.update(weight=weight, bias=bias)  # as functional_call does
            norm.forward = _identity
            FOLDED.add(layer)
        yield
    finally:
        for layer, norm, parameters in undo:
            layer._parameters.update(parameters)
            del norm.forward
            FOLDED.discard(layer)


def _identity(input: Tensor) -> Tensor:  # torch's name, since callers may use it
    return input


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that does the work of both."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    scale: Tensor = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * norm.weight  # type: ignore[operator]
    shift = -mean if bias is None else bias - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias  # type: ignore[operator]
    weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        weight, shift = weight.to(dtype), shift.to(dtype)
    return weight, shift


def _pairs(model: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """Which batch norm can be folded into which layer; looked up once, and again when modules were exchanged."""
    modules = list(model.modules())
    if model not in _known or _known[model][0] != modules:
        _known[model] = (modules, tuple(_find_pairs(model, example)))
    return _known[model][1]


def _find_pairs(model: nn.Module, example: Tensor) -> Iterator[Pair]:
    """Watch one forward: whose output enters which batch norm, and whether it goes anywhere else."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if type(module) in _LINEAR_MAPS and _owns_weights(module)]
    norms = [name for name, module in modules.items() if type(module) in _NORMS and module.running_mean is not None]
    outputs: list[tuple[str, Tensor]] = []
    inputs: list[tuple[str, Tensor]] = []
    with (
        mode(model, training=False),
        buffers_kept(model),
        random_state_kept(model),
        torch.enable_grad(),
        tap(model, layers, lambda name, value: outputs.append((name, value))),
        tap(model, norms, lambda name, value: inputs.append((name, value)), side="input"),
    ):
        # not through the model's own hooks, which may count passes; two images, since some norms refuse a single one
        logits = model.forward(example[:2].detach().requires_grad_(True))
    uses = _uses(logits)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for name, output in outputs:
        taken_by = [norm for norm, value in inputs if value is output]
        called = [*(n for n, _ in outputs), *(n for n, _ in inputs)]
        once = len(taken_by) == 1 and called.count(name) == called.count(taken_by[0]) == 1
        shared = any(owners[id(p)] > 1 for p in modules[name]._parameters.values() if p is not None)
        if once and not shared and uses[output.grad_fn] == 1:
            yield name, taken_by[0]


def _owns_weights(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None and not list(module.children())  # no parametrization


def _uses(logits: object) -> Counter[Any]:
    """How many operations on the way to the logits take the result of each operation, by its node in the graph."""
    uses: Counter[Any] = Counter()
    waiting = [logits.grad_fn] if isinstance(logits, Tensor) and logits.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    return uses
