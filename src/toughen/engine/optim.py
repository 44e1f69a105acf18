"""The optimizer of a run, and how a branch takes over its momentum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from toughen.engine.recipe import TrainSettings
from toughen.engine.sharding import is_sharded, load_optimizer
from toughen.objectives import Live


def make_optimizer(live: Live, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make one optimizer over all parameters, whatever is frozen later: a frozen one has no gradient and is skipped.

    It is a fused one, which can be told on the device to leave everything as it is, unless the weights are dealt out.
    """
    groups: list[dict[str, Any]] = [{"params": live.parameters()}]
    if settings.norm_decay == "exclude":
        norms = _norm_parameters(live)
        groups = [
            {"params": [p for p in live.parameters() if id(p) not in norms]},
            {"params": [p for p in live.parameters() if id(p) in norms], "weight_decay": 0.0},
        ]
    fused = not is_sharded(live.model)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=fused,
    )


NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def _norm_parameters(live: Live) -> set[int]:
    """Scale and shift of the norms, by ``id``, and those that a method trains beside them: their names end alike."""
    norms = {name: module for name, module in live.model.named_modules() if isinstance(module, NORMS)}
    ends = tuple(f".{name}.{kind}" for name, norm in norms.items() for kind, _ in norm.named_parameters(recurse=False))
    own = (parameter for name, parameter in live.own_parameters().items() if f".{name}".endswith(ends))
    return {id(p) for module in norms.values() for p in module.parameters(recurse=False)} | {id(p) for p in own}


def parameter_names(optimizer: torch.optim.Optimizer, live: Live) -> list[str]:
    """Return the name of each parameter of the optimizer, in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in live.named_parameters().items()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def continue_momentum(
    optimizer: torch.optim.Optimizer, live: Live, state: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Take over the momentum of another run for all parameters of the same name and shape, and nothing else of it.

    Args:
        optimizer: Keeps its own groups, for example its weight decay.
        live: Whose parameters it holds.
        state: The state of the other run's optimizer.
        names: Its parameters, as ``parameter_names`` returned them there.
    """
    place = {name: number for number, name in enumerate(parameter_names(optimizer, live))}
    parameters = live.named_parameters()
    momentum = {
        place[name]: kept
        for number, kept in state["state"].items()
        if (name := names[number]) in place and _fits(kept, parameters[name])
    }
    load_optimizer(optimizer, {"state": momentum, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(kept: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    """Whether the momentum is of this shape; adapters of another rank bear the same name."""
    return all(value.shape in (parameter.shape, ()) for value in kept.values() if isinstance(value, Tensor))
