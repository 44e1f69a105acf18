"""Training against the activation attack: perturbations made inside the network, cross-entropy on what they do."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from toughen.attacks import Attack, FeatureMatch, FeatureNorm, FeatureShift, Goal
from toughen.errors import InputError, check_choices
from toughen.layers import ModelView
from toughen.layers.taps import submodule
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.objective import METHODS, LiveObjective, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput


@METHODS.register("feature-at")
@dataclass(frozen=True, kw_only=True)
class FeatureAT(Objective):
    """E CE(F(x'), y), where x' moves the features of chosen layers, towards another image's or away from its own.

    ``target="other"`` is the activation attack of Inkawhich et al. (2019) in the training loop, which the CLAT paper
    names as its starting point; ``target="none"`` is the inner problem of Eq. 5 with the outer loss of PGD-AT. The
    search is that of the run's attack; published with ``momentum: 1.0``.

    Args:
        layers: Qualified names of ``toughen list layers MODEL``.
        target: ``"other"``: minimise the distance to the features of an image of the batch with another label, drawn
            at random. ``"none"``: maximise the distance to the image's own features.
        norm: How one layer's difference is measured, see ``feature_distance``.

    Raises:
        InputError: No layer is named, ``layers`` is a single string, or a choice is unknown.
    """

    label: ClassVar[str] = "Feature-AT"

    layers: tuple[str, ...]
    target: Literal["other", "none"] = "other"
    norm: FeatureNorm = "l2"

    def __post_init__(self) -> None:
        check_choices(self, where="feature-at")
        layers: object = self.layers
        if isinstance(layers, str):
            raise InputError(f"feature-at layers is {layers!r}; give a tuple of names, here ({layers!r},)")
        if not self.layers:
            raise InputError("feature-at layers is empty; name at least one of `toughen list layers MODEL`")

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> LiveObjective:
        """Bind these settings to a model, for use in any training loop.

        Raises:
            InputError: The model has no layer of that name, or the attack would begin where its goal has no gradient.
        """
        for name in self.layers:
            submodule(model, name)
        if self.target == "none" and not getattr(attack, "random_start", True):
            raise InputError(
                "feature-at target='none' with the attack's random_start=False never moves an image, since the distance"
                " has no gradient at the clean one; set random_start=True"
            )
        return LiveObjective(model, objective=self, attack=attack, seed=seed)

    def perturb(
        self, model: nn.Module, batch: Batch, attack: Attack, *, generator: torch.Generator
    ) -> AdversarialBatch:
        """Search in the space of features."""
        goal: Goal = FeatureShift(layers=self.layers, norm=self.norm)
        if self.target == "other":
            partner = other_label(batch.y, generator)
            goal = FeatureMatch(layers=self.layers, x_target=batch.x[partner], norm=self.norm)
        x_adv = attack(model, batch.x, batch.y, goal=goal, start=batch.start, generator=generator)
        return AdversarialBatch(batch, x_adv)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Return the cross-entropy of the perturbed images."""
        loss = cross_entropy(view(adv.x_adv), adv.batch.y)
        return StepOutput(loss, {"adv_ce": loss.detach()})


def other_label(y: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each image the place [B] of another one, drawn among those with another label where there are any."""
    draws = torch.rand(len(y), len(y), generator=generator, device=y.device)
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    # another label before another image before the image itself, and by lot among equals
    return (draws + (y[:, None] != y[None, :]).to(draws) - itself.to(draws)).argmax(dim=1)
