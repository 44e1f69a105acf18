"""Weakness from curvature (appendix E): Eq. 9 with its gradient term, instead of Eq. 10's approximation of it."""

import torch
from torch import Tensor

from toughen.layers import ModelView


def curvature(view: ModelView, x: Tensor, x_adv: Tensor, name: str, clean: Tensor) -> Tensor:
    """Estimate the curvature of G_i(z) = ||F_i(z) - F_i(x)||^2 around x, per sample.

    Eq. 9: nu_i(x) = || J_i(x')^T (F_i(x') - F_i(x)) ||_2 / || x' - x ||_2 with J_i = dF_i/dx and x' = x_adv. (The
    gradient of Eq. 7 has a factor 2, which Eq. 9 drops; so do we.) For a linear layer F_i(x) = A x this is
    ||A^T A d|| / ||d||.

    Args:
        view: The model, in eval mode.
        x: [B, ...] clean images.
        x_adv: [B, ...] perturbed images.
        name: Qualified name of the layer.
        clean: F_i(x), constant.

    Returns:
        [B], float64, non-negative; 0 where x_adv equals x.
    """
    z = x_adv.detach().requires_grad_(True)
    with torch.enable_grad():
        energy = view.features(
            z, [name], reduce=lambda _, feature: (feature - clean).square().sum() / 2, stop_early=True
        )
        (gradient,) = torch.autograd.grad(energy.values[name], z)
    distance = torch.linalg.vector_norm((x_adv - x).double().flatten(1), dim=1)
    slope = torch.linalg.vector_norm(gradient.double().flatten(1), dim=1)
    return torch.where(distance > 0, slope / distance.clamp_min(1e-300), 0.0)
