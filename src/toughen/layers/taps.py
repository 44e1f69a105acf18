"""Scoped hooks and scoped modes: whatever happens inside the ``with``, the model is left as it was found."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from toughen.errors import unknown


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule with this qualified name.

    Raises:
        InputError: The model has none; the message names the nearest one.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = (known for known, _ in model.named_modules() if known)
        raise unknown("layer", name, names, hint="see `toughen list layers MODEL`") from None


@contextmanager
def tap(
    model: nn.Module,
    names: Iterable[str],
    fn: Callable[[str, Any], None],
    *,
    side: Literal["output", "input"] = "output",
) -> Iterator[None]:
    """Call ``fn(name, value)`` on the output (or first input) of each named submodule, inside the ``with``.

    ``fn`` sees the tensor before anything downstream can change it in place: reduce or clone it there.
    What ``fn`` raises passes through the forward, which is how a view stops early.

    Args:
        model: Any module; its hooks are the same before and after.
        names: Qualified names of submodules.
        fn: Receives the qualified name and the value (a tensor, unless the module returns something else).
        side: ``"output"`` for what the module returns, ``"input"`` for its first argument, by position or keyword.

    Raises:
        InputError: A name is not a submodule.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled forward would pass the hooks by
        for name in names:
            module = submodule(model, name)
            if side == "output":
                handle = module.register_forward_hook(lambda _m, _i, out, name=name: fn(name, out))
            else:
                handle = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: fn(name, next(chain(args, kwargs.values()), None)),
                    with_kwargs=True,
                )
            stack.callback(handle.remove)
        yield


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody looks at what goes through this module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every submodule into train or eval mode inside the ``with``; give each its own flag back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient inside the ``with``: attacks differentiate the input alone."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its value back after the ``with`` (batch statistics drift in train mode)."""
    before = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value, version in before:
                module._buffers[name] = buffer  # a forward may have put another tensor there
                # batch norm's kernels change statistics without counting it as a new version; elsewhere the version
                # decides, since a needless write would invalidate a graph that the caller holds
                if module.training or buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Give torch's global random state back after the ``with`` (dropout draws from it, and noisy models in eval)."""
    devices = {p.device for p in chain(model.parameters(), model.buffers()) if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield
