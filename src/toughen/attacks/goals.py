"""What an attack maximises. A goal is bound to a clean batch and then scores perturbed images, per sample."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from toughen.attacks.probabilities import (
    at_least_float32,
    kl_divergence,
    log_probabilities,
    probabilities,
    squared_distance,
    squared_error,
)
from toughen.errors import InputError
from toughen.layers import ModelView

Objective = Callable[[Tensor], Tensor]
FeatureNorm = Literal["l2", "squared", "rms", "dim", "relative"]


class Goal(Protocol):
    """Binds to a clean batch; what it returns maps x_adv [B, ...] to [B] values, higher is worse for the model.

    A goal that looks at layers names them in an attribute ``layers``, so that they are not folded (``norms_folded``).
    """

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """Look at the clean batch once; return the function to maximise."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the true label (untargeted); 0 for an image without one (label -1)."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``x`` is not used."""
        return lambda x_adv: F.cross_entropy(at_least_float32(view(x_adv)), y, reduction="none", ignore_index=-1)


@dataclass(frozen=True)
class LeastLikely:
    """Minus the cross-entropy with the class that the clean image is least likely to be: a targeted attack."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``y`` is not used."""
        with torch.no_grad():
            target = view(x).argmin(dim=1)
        return lambda x_adv: -F.cross_entropy(at_least_float32(view(x_adv)), target, reduction="none")


@dataclass(frozen=True)
class SquaredError:
    """||p(x_adv) - e_y||^2, the Brier score (untargeted); 0 for an image without a label (-1)."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``x`` is not used."""
        return lambda x_adv: squared_error(probabilities(view(x_adv)), y)


@dataclass(frozen=True)
class Margin:
    """The largest wrong logit minus the true one: positive exactly where the model errs."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``x`` is not used."""

        def margin(x_adv: Tensor) -> Tensor:
            logits = view(x_adv)
            true = logits.gather(1, y[:, None]).squeeze(1)
            wrong = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
            return wrong - true

        return margin


@dataclass(frozen=True)
class KLToClean:
    """KL(p(x) || p(x_adv)), TRADES' inner objective; its gradient vanishes at x_adv = x, so start elsewhere."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``y`` is not used."""
        with torch.no_grad():
            log_p = log_probabilities(view(x))
        return lambda x_adv: kl_divergence(log_p, log_probabilities(view(x_adv)))


@dataclass(frozen=True)
class ProbabilityShift:
    """||p(x_adv) - p(x)||^2, SCORE's inner objective; its gradient vanishes at x_adv = x, so start elsewhere."""

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``y`` is not used."""
        with torch.no_grad():
            p = probabilities(view(x))
        return lambda x_adv: squared_distance(probabilities(view(x_adv)), p)


@dataclass(frozen=True, kw_only=True)
class FeatureShift:
    """Sum over layers of ||F_i(x_adv) - F_i(x)||, the inner problem of Eq. 5; F_i(x) is constant here.

    Its gradient vanishes at x_adv = x, so start elsewhere.

    Args:
        layers: Qualified names of the layers S.
        norm: How one layer's difference is measured, see ``feature_distance``.
        stop_early: Leave out what follows the deepest layer of S: same perturbation, less work.
        clean: F_i(x) by layer, [B, ...], where a forward has it already; None computes it.
    """

    layers: tuple[str, ...]
    norm: FeatureNorm = "l2"
    stop_early: bool = True
    clean: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("FeatureShift needs at least one layer")

    def bind(self, view: ModelView, x: Tensor, y: Tensor) -> Objective:
        """See ``Goal.bind``; ``y`` is not used."""
        with torch.no_grad():
            known = self.clean or view.features(x, self.layers, stop_early=self.stop_early).values
        clean = {name: known[name].detach() for name in self.layers}
        return distance_from(clean, view, norm=self.norm, stop_early=self.stop_early)


def distance_from(
    reference: Mapping[str, Tensor], view: ModelView, *, norm: FeatureNorm, stop_early: bool
) -> Objective:
    """Return the map of x_adv [B, ...] to the sum over layers of ||F_i(x_adv) - reference_i||, [B].

    Args:
        reference: Features by layer, [B, ...], taken as constant.
        view: The network.
        norm: See ``feature_distance``.
        stop_early: Leave out what follows the deepest layer.
    """

    def distance(x_adv: Tensor) -> Tensor:
        distances = view.features(
            x_adv,
            tuple(reference),
            reduce=lambda name, feature: feature_distance(feature, reference[name], norm=norm),
            stop_early=stop_early,
        ).values
        return sum_over(distances.values())

    return distance


def feature_distance(feature: Tensor, clean: Tensor, *, norm: FeatureNorm = "l2") -> Tensor:
    """Measure ||F_i(x_adv) - F_i(x)|| per sample (the term of Eq. 4 and 5), differentiable everywhere.

    Args:
        feature: F_i(x_adv), [B, ...].
        clean: F_i(x), same shape.
        norm: With N features per sample: ``"l2"`` the length (Eq. 5), ``"squared"`` its square, ``"rms"`` divided by
            sqrt(N), ``"dim"`` divided by N, ``"relative"`` divided by the length of F_i(x), taken as constant.

    Returns:
        [B], non-negative.
    """
    squares = at_least_float32(feature - clean).flatten(1).square().sum(dim=1)
    if norm == "squared":
        return squares
    length = (squares + 1e-12).sqrt()  # the gradient of a bare sqrt at 0 is infinite
    num_features = feature[0].numel()
    if norm == "rms":
        return length / math.sqrt(num_features)
    if norm == "dim":
        return length / num_features
    if norm == "relative":
        scale: Tensor = torch.linalg.vector_norm(clean.detach().flatten(1), dim=1)
        return length / scale.clamp_min(1e-12)
    return length


def sum_over(values: Iterable[Tensor]) -> Tensor:
    """Add the per-layer distances, each [B], in the order given."""
    return torch.stack(list(values)).sum(dim=0)
