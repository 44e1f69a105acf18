"""L_C of Eq. 5: how far the features of the chosen layers move under one perturbation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toughen.attacks.goals import FeatureNorm, feature_distance, sum_over
from toughen.layers import ModelView
from toughen.layers.taps import submodule

LayerGradient = Literal["flow", "own"]


def feature_loss(
    view: ModelView,
    x: Tensor,
    x_adv: Tensor,
    layers: Sequence[str],
    *,
    norm: FeatureNorm = "l2",
    clean: Mapping[str, Tensor] | None = None,
    clean_grad: Literal["keep", "detach"] = "keep",
    layer_grad: LayerGradient = "flow",
    stop_early: bool = True,
) -> Tensor:
    """Return L_C(f_S) = E_x sum over i in S of ||F_i(x_adv) - F_i(x)|| (Eq. 5 at a given perturbation).

    Args:
        view: The model.
        x: [B, C, H, W], clean images.
        x_adv: [B, C, H, W], perturbed images, constant here.
        layers: Qualified names of S.
        norm: How one layer's difference is measured, see ``feature_distance``.
        clean: F_i(x) where a forward has it already (with its gradient); None computes it. With
            ``layer_grad="own"`` it is computed in any case.
        clean_grad: Whether F_i(x) depends on the weights (as Eq. 5 is written) or is a constant.
        layer_grad: ``"flow"``: the term of a layer also trains the layers before it that are selected (as Eq. 6 is
            written). ``"own"``: it trains this layer alone.
        stop_early: Leave out what follows the deepest layer of S.

    Returns:
        A scalar, mean over the batch.
    """
    with _inputs_detached(view.module, layers if layer_grad == "own" else ()):
        if clean is None or layer_grad == "own":
            with torch.set_grad_enabled(torch.is_grad_enabled() and clean_grad == "keep"):
                clean = view.features(x, layers, stop_early=stop_early).values
        constant = {name: feature.detach() for name, feature in clean.items()} if clean_grad == "detach" else clean
        moved = view.features(
            x_adv,
            layers,
            reduce=lambda name, feature: feature_distance(feature, constant[name], norm=norm),
            stop_early=stop_early,
        )
    return sum_over(moved.values.values()).mean()


@contextmanager
def _inputs_detached(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Cut the graph in front of each named layer, inside the ``with``."""
    handles = [submodule(model, name).register_forward_pre_hook(_detach_tensors, with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detach_tensors(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
