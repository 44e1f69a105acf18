"""Everything about a model, and about torch, that a library call must leave as it found it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are bit-identical (or both absent)."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Assert, also after an exception, that nothing observable changed inside the ``with``."""
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = _hooks(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    values = {name: v.clone() for name, v in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert _hooks(model) == hooks
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: id(p) for name, p in model.named_parameters()} == identities
        assert [n for n, v in model.state_dict().items() if not same(v, values[n])] == []
        assert [n for n, p in model.named_parameters() if not same(p.grad, grads[n])] == []
        assert torch.equal(torch.get_rng_state(), random_state)


def disturb(model: nn.Module) -> None:
    """Put a model into a state that is easy to spoil: mixed modes, mixed flags, some gradients in place."""
    for position, module in enumerate(model.modules()):
        module.training = position % 3 != 1
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 4 != 2)
        if position % 2 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)


def _hooks(model: nn.Module) -> dict[str, list[int]]:
    return {
        f"{name}{kind}": [id(hook) for hook in getattr(module, kind).values()]
        for name, module in model.named_modules()
        for kind in _HOOKS
    }
