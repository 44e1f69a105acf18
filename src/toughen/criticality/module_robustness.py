"""Module robust criticality (RiFT, Zhu et al. 2023): by how much the robust loss can grow if one module's weight moves.

It has nothing but the word in common with the criticality index of CLAT: that one compares features, this one losses.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from toughen.attacks import Attack
from toughen.attacks.probabilities import at_least_float32
from toughen.errors import InputError
from toughen.layers import Layer, map_layers
from toughen.layers.substitutes import substitutes
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.rng import generator
from toughen.types import Batches, check_images

LabelledBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModuleRobustness:
    """One row of a report.

    Attributes:
        name: Qualified name of the module.
        mrc: Its module robust criticality, >= 0, in units of the loss; infinite where the ascent left all numbers.
        weight_norm: ||theta_i||_2 of its weight.
    """

    name: str
    mrc: float
    weight_norm: float


@dataclass(frozen=True)
class ModuleRobustnessReport:
    """The module robust criticality of every module.

    Attributes:
        loss: R(theta), the mean cross-entropy on the adversarial images at the weights as they are.
        num_samples: How many images these are.
        rows: One per module, in order of first execution.
    """

    loss: float
    num_samples: int
    rows: tuple[ModuleRobustness, ...]

    @property
    def chosen(self) -> ModuleRobustness:
        """The least critical module, which RiFT fine-tunes; of equal ones the first."""
        return min(self.rows, key=lambda row: row.mrc)


def module_robustness(
    model: nn.Module,
    batches: Batches,
    attack: Attack,
    *,
    eps: float = 0.1,
    epochs: int = 10,
    layers: Sequence[Layer] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ModuleRobustnessReport:
    """Measure ``MRC_i = max over ||D||_2 <= eps ||theta_i||_2 of R(theta + D on module i) - R(theta)`` for all modules.

    R is the mean cross-entropy on a fixed set of adversarial images, which are made once at ``theta``. The maximum is
    searched as in the official code: SGD of rate 1 ascends batch by batch from D = 0, in eval mode; after each of
    ``epochs`` passes D is projected and R is taken. The largest R counts, that of D = 0 among them, so MRC_i >= 0. The
    paper's algorithm stops where the constraint is hit; the official code makes its images from the test set, so here
    give training images.

    Args:
        model: Any module that maps [B, ...] images to [B, K] logits; left exactly as found.
        batches: (x, y) pairs (or ``Batch``): x [B, ...] float inside the attack's bounds, y [B] int64, -1 is left out.
            They are the batches of the ascent too. Moved to the model's device, and their adversarial form kept there.
        attack: Makes the adversarial images, by cross-entropy.
        eps: Radius relative to ||theta_i||_2, > 0.
        epochs: Passes of the ascent, at least 1.
        layers: Which modules to measure; None is every convolution and linear map that the first image runs through,
            classifier included. Those that do not own their weight are left out.
        seed: Of the attack's random starts.
        progress: Called with the number of modules done, after each.

    Returns:
        The report.

    Raises:
        InputError: A setting is out of its range, no labelled images, a loss that is no number, or nothing to measure.
    """
    if not 0 < eps < math.inf or epochs < 1:
        raise InputError(f"module robustness eps is {eps!r} and epochs {epochs}; they must be > 0 and at least 1")
    images = _attacked(model, batches, attack, seed)
    weights = _weights(model, map_layers(model, images[0][0][:1]) if layers is None else layers)
    if not weights:
        raise InputError(f"none of the layers of {type(model).__name__} owns its weight; nothing to measure")
    rows = []
    with _as_found(model):
        robust = _Robustness(model, images)
        loss = robust.loss({})
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of {type(model).__name__} on the adversarial images is {loss}; nothing to measure"
            )
        for name, weight in weights.items():
            worst = max(loss, *robust.ascent(weight, eps * weight.norm(), epochs))
            rows.append(ModuleRobustness(name, worst - loss, float(weight.norm())))
            if progress is not None:
                progress(len(rows))
    return ModuleRobustnessReport(loss, sum(len(y) for _, y in images), tuple(rows))


def _attacked(model: nn.Module, batches: Batches, attack: Attack, seed: int) -> list[LabelledBatch]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    for number, (x, y, *_) in enumerate(batches):
        labelled = y >= 0
        x, y = x[labelled].to(device), y[labelled].to(device)  # noqa: PLW2901
        if not len(y):
            continue
        check_images(x, attack.threat.bounds)
        draw = generator(seed, "module robustness", number, device=device)
        found.append((attack(model, x, y, generator=draw), y))
    if not found:
        raise InputError("no labelled images to measure module robustness on: the batches are empty")
    return found


def _weights(model: nn.Module, layers: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """The weights of the layers that own one, by the layer's name."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return {layer.name: own[f"{layer.name}.weight"] for layer in layers if f"{layer.name}.weight" in own}


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(without_weight_gradients(model))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(random_state_kept(model))
        yield


class _Robustness:
    """R(theta + D on one weight), without ever writing into a weight."""

    def __init__(self, model: nn.Module, images: Sequence[LabelledBatch]) -> None:
        self.model = model
        self.images = images

    def loss(self, moved: Mapping[Tensor, Tensor]) -> float:
        """Return R with other tensors in the place of some weights."""
        with torch.no_grad():
            sums = [self._cross_entropy(moved, x, y).double() * len(y) for x, y in self.images]
        return float(torch.stack(sums).sum()) / sum(len(y) for _, y in self.images)

    def ascent(self, weight: nn.Parameter, radius: Tensor, epochs: int) -> Iterator[float]:
        """Yield R after each pass of the ascent, always inside the radius."""
        start = weight.detach()
        theta = start
        for _ in range(epochs):
            for x, y in self.images:
                theta = theta.detach().requires_grad_(True)
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(self._cross_entropy({weight: theta}, x, y), theta)
                theta = theta.detach() + gradient
            delta = theta - start
            theta = start + delta * (radius / delta.norm().clamp_min(1e-30)).clamp_max(1.0)
            loss = self.loss({weight: theta})
            if not math.isfinite(loss):  # a step of rate 1 has left all numbers: nothing is more critical
                yield math.inf
                return
            yield loss

    def _cross_entropy(self, moved: Mapping[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.model, substitutes(self.model, moved), (x,), tie_weights=False)
        return F.cross_entropy(at_least_float32(logits), y)
