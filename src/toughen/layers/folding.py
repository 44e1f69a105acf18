"""Batch norm in eval mode is an affine map: here it becomes part of the convolution before it, for a while."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from toughen.layers.synced_norms import SyncedBatchNorm
from toughen.layers.taps import buffers_kept, has_hooks, random_state_kept, tap, without_weight_gradients

# exactly these: a subclass may do more in its forward, as timm's norms do with their activation
_LINEAR_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncedBatchNorm)


class _Pair(NamedTuple):
    """A convolution (or linear map) and the batch norm that takes its output, by qualified name.

    ``between`` are modules that take or return that output as it is, and ``dtype`` is what the layer computes in.
    """

    layer: str
    norm: str
    between: tuple[str, ...]
    dtype: torch.dtype


# layers whose output is, at the moment, that of the norm behind them
FOLDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, tuple[_Pair, ...]]] = weakref.WeakKeyDictionary()


@contextmanager
def norms_folded(model: nn.Module, example: Tensor, *, keep: Collection[str] = ()) -> Iterator[None]:
    """Inside the ``with``, each batch norm in eval mode is computed by the convolution whose output it alone takes.

    ``W' = W * scale / std`` and ``b' = (b - mean) * scale / std + shift``, per channel, in the weights' precision and
    differentiable in all of them; under autocast they are cast once, here. Outputs are equal up to rounding, with
    fewer passes over activations and none kept for the norm. Batch norms in train mode, without running statistics, or
    whose convolution's output or weight goes elsewhere too stay as they are, and so do modules that carry hooks.

    Args:
        model: Any module; the same after the ``with``. Its forward chooses its way by its modules and their modes
            alone, not by the images' content.
        example: [B, ...] images; two of them show, once for each model and its modes, which batch norm follows which
            layer.
        keep: Qualified names of layers whose own output will be looked at.
    """
    modules = dict(model.named_modules())
    # weights that are dealt out to several processes are whole inside their layer's own forward alone
    foldable = not isinstance(model, FSDPModule) and any(type(m) in _NORMS and not m.training for m in modules.values())
    undo: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
    folded: list[nn.Module] = []
    try:
        for pair in _pairs(model, example) if foldable else ():
            layer, norm = modules[pair.layer], modules[pair.norm]
            names = (pair.layer, pair.norm, *pair.between)
            if layer in FOLDED or not _foldable(layer, norm) or not {*names}.isdisjoint(keep):
                continue
            if any(has_hooks(modules[name]) or "forward" in vars(modules[name]) for name in names):
                continue
            weight, bias = _folded(layer, norm, pair.dtype)
            undo.append((layer, norm, dict(layer._parameters)))
            layer._parameters.update(weight=weight, bias=bias)  # as functional_call does
            norm.forward = _identity
            folded += [layer, *(modules[name] for name in pair.between)]
        FOLDED.update(folded)
        yield
    finally:
        for layer, norm, parameters in undo:
            layer._parameters.update(parameters)
            del norm.forward
        FOLDED.difference_update(folded)


def _identity(input: Tensor) -> Tensor:  # torch's name, since callers may use it
    return input


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    return _owns_weights(layer) and norm.running_mean is not None and not norm.training


def _owns_weights(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None and not list(module.children())  # no parametrization


def _folded(layer: nn.Module, norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
    return weight.to(dtype), shift.to(dtype)


def _pairs(model: nn.Module, example: Tensor) -> tuple[_Pair, ...]:
    """Which batch norm can be folded into which layer; looked up again when modules or modes are others."""
    device = example.device.type
    casts = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # references, since a value that holds its own key is never let go
    state = (casts, [(weakref.ref(module), module.training) for module in model.modules()])
    if model not in _known or _known[model][0] != state:
        _known[model] = (state, tuple(_find_pairs(model, example)))
    return _known[model][1]


def _find_pairs(model: nn.Module, example: Tensor) -> Iterator[_Pair]:
    """Watch one forward: whose output enters which batch norm, and what else is done with it."""
    modules = {n: m for n, m in model.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)}
    layers = {name for name, module in modules.items() if type(module) in _LINEAR_MAPS and _owns_weights(module)}
    outputs: list[tuple[str, Any]] = []
    inputs: list[tuple[str, Any]] = []
    reads = _Reads()

    def leave(name: str, value: Any) -> None:
        outputs.append((name, value))
        if name in layers:
            reads.begin(value)

    with (
        buffers_kept(model),
        random_state_kept(model),
        without_weight_gradients(model),  # else autocast keeps a copy of each weight, whose readers would be counted
        torch.enable_grad(),
        tap(model, modules, leave),
        tap(model, modules, lambda name, value: inputs.append((name, value)), side="input"),
        reads,
    ):
        # not through the model's own hooks, which may count passes; two images, since some norms refuse a single one
        result = model.forward(example[:2].detach().requires_grad_(True))
    returned = {_memory(value) for value in tree_iter(result) if isinstance(value, Tensor)}
    calls = Counter(name for name, _ in inputs)
    for name, output in outputs:
        if name not in layers:
            continue
        seen_by = dict.fromkeys(other for other, value in (*outputs, *inputs) if value is output and other != name)
        norms = [other for other in seen_by if type(modules[other]) in _NORMS]
        if len(norms) != 1 or calls[name] != 1 or calls[norms[0]] != 1:
            continue
        own = [parameter for parameter in modules[name]._parameters.values() if parameter is not None]
        alone = _memory(output) not in returned and all(reads.of(tensor) == 1 for tensor in (output, *own))
        # a linear map of sequences has its channels last, where batch norm does not look for them
        if alone and output.dim() == own[0].dim():
            yield _Pair(name, norms[0], tuple(other for other in seen_by if other != norms[0]), output.dtype)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves this class untyped
    """Counts the operations that read a tensor, in place and without gradient too. A view only passes it on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._counts.update({_memory(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)})
        return result

    def begin(self, tensor: Tensor) -> None:
        """Forget what another tensor was read for that lay here before."""
        self._counts.pop(_memory(tensor), None)

    def of(self, tensor: Tensor) -> int:
        return self._counts[_memory(tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
