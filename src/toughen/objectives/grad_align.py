"""GradAlign (Andriushchenko & Flammarion 2020): single-step training whose gradients agree all over the ball."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.attacks import Attack, CrossEntropy
from toughen.attacks.threat import BALLS
from toughen.layers import ModelView
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.fast_at import single_step
from toughen.objectives.objective import METHODS, Objective
from toughen.objectives.settings import check_weight
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("gradalign")
@dataclass(frozen=True, kw_only=True)
class GradAlign(Objective):
    """E CE(F(x'), y) + lam * E (1 - cos(g(x), g(x + eta))), x' by FGSM from x, eta uniform in the ball.

    g(x) is the gradient of the cross-entropy with respect to the image, and constant in the regulariser; g(x + eta) is
    differentiated. Images one of whose gradients is zero, or too short for its square to be a number, are left out of
    the mean. x + eta may leave the box of pixels, as in the official code. The threat model and ``model_mode`` are
    those of the run's attack.

    Args:
        lam: Weight of the regulariser, >= 0. Published: 0.2 at eps 8/255, and 0.02 * 10^(255 eps / 8) elsewhere.
        step: Length of the FGSM step as a multiple of eps, clipped to the ball.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "GradAlign"

    lam: float = 0.2
    step: float = 1.25

    def __post_init__(self) -> None:
        check_weight(self.lam, where="gradalign lam")
        check_weight(self.step, where="gradalign step")

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Take the FGSM step, and draw the random point."""
        single = single_step(attack, step=self.step, random_start=False)
        x_adv = single(model, batch.x, batch.y, start=batch.start, generator=generator)
        radius = torch.full_like(batch.x[:, :1, :1, :1], attack.threat.eps)
        second = batch.x + BALLS[attack.threat.norm].sample(batch.x, radius, generator)
        return AdversarialBatch(batch, x_adv, second=second)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images plus ``lam`` times the misalignment."""
        ce = cross_entropy(view(adv.x_adv), adv.batch.y)
        if self.lam == 0:
            return StepOutput(ce, {"adv_ce": ce.detach()})
        assert adv.second is not None
        here = image_gradient(view, adv.batch.x, adv.batch.y, create_graph=False)
        there = image_gradient(view, adv.second, adv.batch.y, create_graph=True)
        misalignment = one_minus_cosine(here, there)
        terms = {"adv_ce": ce.detach(), "misalignment": misalignment.detach()}
        return StepOutput(ce + self.lam * misalignment, terms)


def image_gradient(view: ModelView, x: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    """Return the gradient of the cross-entropy with respect to images, [B, ...]; of each image alone in eval mode."""
    x = x.detach().requires_grad_(True)
    value = CrossEntropy().bind(view, x, y)(x).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph)
    return gradient


def one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of 1 - cos over the samples of which neither vector is zero, in [0, 2]; 0 if there is none.

    A vector so short that the square of its length underflows counts as zero.
    """
    a, b = a.flatten(1), b.flatten(1)
    shortest = torch.finfo(a.dtype).tiny ** 0.5
    lengths = [torch.linalg.vector_norm(v.detach(), dim=1) for v in (a, b)]
    counts = (lengths[0] > shortest) & (lengths[1] > shortest)
    # a zero vector has no direction, and its cosine no gradient: it is put aside before the division, not after
    safe_a, safe_b = (torch.where(counts[:, None], v, torch.ones_like(v)) for v in (a, b))
    cosine = F.cosine_similarity(safe_a, safe_b, dim=1, eps=0.0)
    mean: Tensor = ((1 - cosine) * counts).sum() / counts.sum().clamp(min=1)
    return mean
