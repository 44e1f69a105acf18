"""Carlini and Wagner's attack (2017): the nearest error in l2, found by ``foolbox``, an optional dependency."""

import math
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from toughen.errors import InputError, first_line
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.types import ThreatModel


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """The smallest l2 perturbation that makes the model err: min ||delta||^2 + c max(z_y - max_{j != y} z_j, -kappa).

    Adam searches in tanh space, and c is searched by bisection. Settings are ``foolbox``'s own, except for a tenth of
    its steps. Each search ends early where a tenth of the steps brought the sum of losses over the images down by less
    than 0.01 %, so what is found for an image depends slightly on the images attacked with it.

    Args:
        threat: l2. Its eps does not bound the search: what is returned may be farther, and then does not count.
        steps: Of Adam, at most, for each c; at least 1.
        binary_search_steps: Values of c, at least 1; each costs a search.
        step_size: Of Adam, in tanh space, > 0.
        confidence: kappa: by how much a wrong logit must exceed the right one, >= 0.
        initial_const: The first c, > 0.

    Raises:
        InputError: A setting is out of its range.
    """

    libraries: ClassVar[tuple[str, ...]] = ("foolbox",)

    threat: ThreatModel
    steps: int = 1000
    binary_search_steps: int = 9
    step_size: float = 0.01
    confidence: float = 0.0
    initial_const: float = 1e-3

    def __post_init__(self) -> None:
        if self.threat.norm != "l2":
            raise InputError(f"CarliniWagner minimises l2 norms; the threat model is {self.threat.norm}: use norm l2")
        for name in ("steps", "binary_search_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"CarliniWagner {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("step_size", "initial_const"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"CarliniWagner {name} is {getattr(self, name)!r}; it must be a finite number > 0")
        if not (math.isfinite(self.confidence) and self.confidence >= 0):
            raise InputError(f"CarliniWagner confidence is {self.confidence!r}; it must be a finite number >= 0")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Attack images, and leave the model exactly as found.

        Args:
            model: Maps [B, ...] images to [B, K] logits; attacked in eval mode.
            x: [B, ...], float, inside ``threat.bounds``.
            y: [B], int64 labels.
            generator: Not used: the search draws nothing.

        Returns:
            x_adv, detached, in the box, at any distance; the image itself where no error was found.

        Raises:
            InputError: ``foolbox`` is not installed.
        """
        foolbox = _foolbox()
        images = x.detach().clamp(*self.threat.bounds)  # a pixel beyond by rounding would be refused
        if not len(images):
            return images
        search = foolbox.attacks.L2CarliniWagnerAttack(
            steps=self.steps,
            binary_search_steps=self.binary_search_steps,
            stepsize=self.step_size,
            confidence=self.confidence,
            initial_const=self.initial_const,
        )
        with (
            mode(model, training=False),
            without_weight_gradients(model),
            buffers_kept(model),
            random_state_kept(model),
        ):
            victim = foolbox.PyTorchModel(model, bounds=self.threat.bounds, device=x.device)
            x_adv, _, found = search(victim, images, foolbox.criteria.Misclassification(y), epsilons=None)
        # what it has no answer for comes back as an image of zeros, which may happen to be an error
        found = found & (x_adv != 0).flatten(1).any(dim=1)
        return torch.where(found.view(-1, *[1] * (x.dim() - 1)), x_adv.detach(), x.detach())


def _foolbox() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports by names that SciPy has deprecated
            import foolbox
    except ImportError as error:
        raise InputError(
            f"CarliniWagner needs foolbox ({first_line(error)}); install it with pip install 'toughen[attacks]'"
        ) from error
    module: ModuleType = foolbox
    return module
