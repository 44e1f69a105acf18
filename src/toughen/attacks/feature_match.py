"""The activation attack (Inkawhich et al. 2019): make an image look, inside the network, like another one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toughen.attacks.goals import FeatureNorm, Objective, distance_from
from toughen.errors import InputError
from toughen.layers import ModelView


@dataclass(frozen=True, kw_only=True)
class FeatureMatch:
    """Minus the sum over layers of ||F_i(x_adv) - F_i(x_target)||: 0 at the best, where the features are the target's.

    Published with momentum 1 (``PGD(momentum=1.0)``) and a single layer.

    Args:
        layers: Qualified names of the layers.
        x_target: [B, ...], one target for each image.
        norm: How one layer's difference is measured, see ``feature_distance``.
        stop_early: Leave out what follows the deepest layer: same perturbation, less work.

    Raises:
        InputError: No layer is named.
    """

    layers: tuple[str, ...]
    x_target: Tensor
    norm: FeatureNorm = "l2"
    stop_early: bool = True

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("FeatureMatch needs at least one layer")

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``x`` and ``y`` are not used."""
        with torch.no_grad():
            target = view.features(self.x_target, self.layers, stop_early=self.stop_early).values
        distance = distance_from(target, view, norm=self.norm, stop_early=self.stop_early)
        return lambda x_adv: -distance(x_adv)
