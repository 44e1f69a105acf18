"""Adaptive smoothing (Bai et al. 2024): learn to tell attacked images, and so which of two frozen networks to trust."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.attacks import Attack
from toughen.errors import InputError, check_choices
from toughen.layers import ModelView
from toughen.models.adaptive_smoothing import SmoothedMixture
from toughen.objectives.cross_entropy import labelled_mean
from toughen.objectives.objective import METHODS, LiveObjective, Method, Objective
from toughen.objectives.settings import check_weight
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("adaptive-smoothing")
@dataclass(frozen=True, kw_only=True)
class AdaptiveSmoothing(Objective):
    """Train the mixing network of a mixture, and nothing else.

    ``mean over clean and attacked images of w_d D + w_c C + w_p D C``, where ``D = BCE(gamma(x), is x attacked)`` and
    ``C = CE(mixture(x), y)`` are those of one image. Clean and attacked images stand in one batch, so that batch norm
    in the mixing network sees both; while it trains alpha spans (0, 1).

    From the official code (commit 51f0198): the weights 1.5, 0 and 0.3 of its CIFAR-10 model, and gammas clamped to 0.6
    standard deviations. It attacks with APGD on ten losses, of random radius and length, which also mislead D, and
    repeats nine further clean batches; here the attack of the run stands in its place.

    Args:
        attacked: Whose cross-entropy the attack maximises: ``"mixture"`` (adaptive, as published), ``"robust"`` (the
            robust network alone), or ``"both"``, one after the other, which gives two attacked images per clean one.
        detect_weight: w_d, at least 0.
        ce_weight: w_c, at least 0.
        product_weight: w_p, at least 0.

    Raises:
        InputError: A setting is out of its range, or all weights are 0.
    """

    label: ClassVar[str] = "Adaptive smoothing"
    conflicts: ClassVar[Mapping[str, str]] = {
        "clat": "both networks of a mixture are frozen, so nothing is left to tune; train the robust network with"
        " PGD-AT + CLAT and mix the result (model.robust=RUN)",
        "lora": "both networks of a mixture are frozen; adapt the robust network first and mix the result",
        "rift": "both networks of a mixture are frozen; tune the robust network first and mix the result",
        "twins": "both networks of a mixture are frozen; tune the robust network first and mix the result",
    }

    attacked: Literal["mixture", "robust", "both"] = "mixture"
    detect_weight: float = 1.5
    ce_weight: float = 0.0
    product_weight: float = 0.3

    def __post_init__(self) -> None:
        check_choices(self, where="adaptive-smoothing")
        names = ("detect_weight", "ce_weight", "product_weight")
        for name in names:
            check_weight(getattr(self, name), where=f"adaptive-smoothing {name}")
        if not any(getattr(self, name) for name in names):
            raise InputError(f"adaptive-smoothing {', '.join(names)} are all 0; nothing would be learned")

    def check_stack(self, methods: Sequence[Method]) -> None:
        """See ``Method.check_stack``."""
        for method in methods:
            if getattr(method, "norm_stats", None) == "reestimate":
                raise InputError(
                    f"{method.label} with norm_stats='reestimate' would measure batch norm anew, on clean images alone,"
                    " and that of both frozen networks too; set its norm_stats='copy'"
                )

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Attack what ``attacked`` names; with ``"both"`` the images against the robust network are ``second``."""
        mixture = _learned(model)
        targets: dict[str, nn.Module] = {"mixture": _InTraining(mixture), "robust": mixture.robust}
        found = [
            attack(target, batch.x, batch.y, start=batch.start, generator=generator)
            for name, target in targets.items()
            if self.attacked in (name, "both")
        ]
        return AdversarialBatch(batch, found[0], second=found[1] if self.attacked == "both" else None)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the loss of clean and attacked images together; images without a label add nothing."""
        attacked = [adv.x_adv] if adv.second is None else [adv.x_adv, adv.second]
        count, copies = len(adv.batch.x), 1 + len(attacked)
        out = _learned(view.module).mixed(torch.cat([adv.batch.x, *attacked]), in_range=False)
        assert out.gamma is not None
        y = adv.batch.y.repeat(copies)
        is_attacked = torch.arange(len(y), device=y.device) >= count
        detect = F.binary_cross_entropy_with_logits(out.gamma, is_attacked.to(out.gamma), reduction="none")
        ce = F.cross_entropy(out.log_probabilities, y, ignore_index=-1, reduction="none")
        each = self.detect_weight * detect + self.ce_weight * ce + self.product_weight * detect * ce
        terms = {"detect_bce": labelled_mean(detect, y).detach(), "mixture_ce": labelled_mean(ce, y).detach()}
        return StepOutput(labelled_mean(each, y), terms)

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> "LiveAdaptiveSmoothing":
        """Bind to a mixture whose alpha is learned, and freeze its two networks.

        Raises:
            InputError: The model is something else.
        """
        return LiveAdaptiveSmoothing(_learned(model), objective=self, attack=attack, seed=seed)


class LiveAdaptiveSmoothing(LiveObjective):
    """Adaptive smoothing bound to a mixture, whose two networks it keeps frozen until ``release``."""

    def __init__(self, model: SmoothedMixture, *, objective: AdaptiveSmoothing, attack: Attack, seed: int = 0) -> None:
        super().__init__(model, objective=objective, attack=attack, seed=seed)
        bases = [parameter for network in (model.accurate, model.robust) for parameter in network.parameters()]
        self._frozen = [parameter for parameter in bases if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None

    def release(self) -> None:
        """See ``Live.release``."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class _InTraining(nn.Module):
    """A mixture as it trains, for attacks: alpha spans (0, 1) although they run it in eval mode."""

    def __init__(self, mixture: SmoothedMixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.training = mixture.training

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture.mixed(x, in_range=False).log_probabilities


def _learned(model: nn.Module) -> SmoothedMixture:
    if not isinstance(model, SmoothedMixture):
        raise InputError(
            f"adaptive-smoothing trains a mixture of two networks, and the model is {type(model).__name__}; set"
            " model={name: adaptive_smoothing, accurate: RUN, robust: RUN}, or use models.mix(..., alpha='learned')"
        )
    if model.alpha != "learned":
        raise InputError(
            f"adaptive-smoothing has nothing to train in a mixture of constant alpha={model.alpha}; evaluate it as it"
            " is, or mix with alpha='learned'"
        )
    return model
