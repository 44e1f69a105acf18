"""Weights, gradients and momentum dealt out to the processes (FSDP), for networks whose training fits on no device."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.conv import _ConvNd

from toughen import processes
from toughen.errors import InputError


def sharded(model: nn.Module) -> nn.Module:
    """Return a copy of which each process holds its share.

    Every layer that owns weights is gathered for itself, in each of its passes, so that the features of any layer may
    be looked at (Eq. 5): in larger units a pass that ends at a feature would leave its unit gathered, and out of date.

    Raises:
        InputError: Layers share their weights.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            raise InputError(
                f"train.strategy=fsdp deals out each weight once, but {name} and {names[id(parameter)]} are one;"
                " use ddp"
            )
    copy = deepcopy(model).to(memory_format=torch.contiguous_format)
    device = next(copy.parameters()).device.type
    mesh = init_device_mesh(device, (processes.count(),))
    for module in list(copy.modules()):
        if isinstance(module, nn.Linear | _ConvNd):
            fully_shard(module, mesh=mesh)
    fully_shard(copy, mesh=mesh, reshard_after_forward=True)  # what is frozen is said of the shares
    return copy


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is one that ``sharded`` returned."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(state: Any) -> Any:
    """Return a state, of nested dicts and lists, with every tensor in one piece. All processes must ask."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def gather(model: nn.Module, into: nn.Module) -> None:
    """Load the weights and buffers of a model that is dealt out into one that is not."""
    into.load_state_dict(whole(model.state_dict()))


def deal_out(model: nn.Module, into: nn.Module) -> None:
    """Load the weights and buffers of a model into one that is dealt out."""
    source = model.state_dict()
    with torch.no_grad():
        for name, tensor in into.state_dict().items():
            tensor.copy_(like(tensor, source[name]))


def like(kept: Tensor, value: Tensor) -> Tensor:
    """Return a value dealt out as another tensor is, if that is."""
    if isinstance(kept, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(kept.device), kept.device_mesh, kept.placements)
    return value


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer, its tensors dealt out as the parameters are that they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        number: {
            key: like(parameters[number], value) if isinstance(value, Tensor) and value.dim() else value
            for key, value in kept.items()
        }
        for number, kept in state["state"].items()
    }
    fused = [group["fused"] for group in optimizer.param_groups]  # how it computes is its own
    optimizer.load_state_dict({**state, "state": placed})
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = value
