"""Low-rank adapters: a weight W becomes W + (alpha / r) * reshape(B A), computed anew wherever the layer reads it.

Names, classes and hooks of the layers stay, so maps, views and selections of layers go on working. Nothing is merged
unless ``merge_adapters`` is called.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toughen.errors import unknown

LowRankForm = Literal["conv", "1x1"]


class LowRank(nn.Module):
    """The change of one weight, as a parametrization of it.

    For a weight [o, i/g, k, k] of a convolution with i input and o output channels in g groups, form ``"conv"``
    (ConvLoRA, Aleem et al. 2024) has A [r k, i k] and B [o/g k, r k], and ``"1x1"`` has A [r, i/g, k, k] and B [o, r]:
    a convolution to r channels and a pointwise one from there (in each group). For a linear map both have A [r, i] and
    B [o, r]. A is uniform within 1/sqrt(fan in) of 0 (Kaiming, a = sqrt 5), B is zero, so at first nothing changes.

    Args:
        weight: [o, i/g, k, k] or [o, i]; the factors get its device and dtype.
        groups: g.
        rank: r, at least 1.
        alpha: Scale of the change, times r.
        form: Of the factors.
        generator: Of A, on the CPU, so that it is the same on every device.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        groups: int = 1,
        rank: int,
        alpha: float,
        form: LowRankForm = "conv",
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        outputs, inputs, height, width = (*weight.shape, 1, 1)[:4]
        if form == "conv":
            shape, columns = (rank * height, inputs * groups * width), outputs // groups * height
        else:
            shape, columns = (rank, *weight.shape[1:]), outputs
        a = torch.empty(shape)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(columns, shape[0]))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        # in this order: the sum takes the memory format of the weight, and with it its kernels
        return weight + self.scale * (self.b @ self.a.flatten(1)).view(weight.shape)


def adaptable(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the convolutions and linear maps that own their weight, by qualified name, in order of definition.

    One whose weight is computed already, for example by spectral norm, is left out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and module._parameters.get("weight") is not None
        and not parametrize.is_parametrized(module)
    }


def attach_adapters(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float | None = None,
    form: LowRankForm = "conv",
    generator: torch.Generator,
) -> None:
    """Give the named layers, and all that share a weight with one of them, low-rank adapters; outputs stay bit for bit.

    Args:
        model: Its parameters ``NAME.weight`` are called ``NAME.parametrizations.weight.original`` from now on, and
            beside them stand the factors ``NAME.parametrizations.weight.0.a`` and ``.b``.
        names: Qualified names, of ``adaptable``.
        rank: r, at least 1.
        alpha: Scale of the change, times r; None is ``rank``.
        form: See ``LowRank``.
        generator: Of the factors, on the CPU.

    Raises:
        InputError: A name is not that of an adaptable layer.
    """
    layers = adaptable(model)
    wanted: set[Tensor] = set()
    for name in names:
        if name not in layers:
            raise unknown("layer to adapt", name, layers, hint="adapters take convolutions and linear maps")
        wanted.add(layers[name].weight)
    made: dict[Tensor, LowRank] = {}
    for module in layers.values():
        weight = module.weight
        if weight not in wanted:
            continue
        if weight not in made:
            made[weight] = LowRank(
                weight,
                groups=getattr(module, "groups", 1),
                rank=rank,
                alpha=rank if alpha is None else alpha,
                form=form,
                generator=generator,
            )
        parametrize.register_parametrization(module, "weight", made[weight])


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """Return the adapters of a model by the qualified names of their layers; layers of one weight share one."""
    return {name: _steps(layer)[0] for name, layer in _adapted(model).items()}


def originals(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights below the adapters, by the qualified names of their layers."""
    return {name: _steps(layer).original for name, layer in _adapted(model).items()}


def merge_adapters(model: nn.Module) -> None:
    """Write what the adapters amount to into the weights and remove them: the model is plain, its outputs the same.

    The weights are the parameters that they were before. A copy of the model that still has adapters keeps them.
    """
    layers, weights = _adapted(model), originals(model)
    merged = {weights[name]: layer.weight.detach() for name, layer in layers.items()}  # what is shared, once
    for name, layer in layers.items():
        # torch's own removal would take the property ``weight`` away from the class, which copies share
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        others = dict(layer._parameters)
        layer._parameters.clear()
        layer.register_parameter("weight", weights[name])  # comes first, as it did
        layer._parameters.update(others)
    with torch.no_grad():
        for weight, value in merged.items():
            weight.copy_(value)


def _adapted(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and parametrize.is_parametrized(module, "weight")
        and isinstance(_steps(module)[0], LowRank)
    }


def _steps(layer: nn.Module) -> Any:
    """Torch's list of what computes the weight of a layer, from ``original``."""
    return layer.get_submodule("parametrizations.weight")
