"""The attacks of AutoAttack (Croce & Hein 2020), run by their authors' code in the package ``pyautoattack``.

On the same images and with the same seed, outcomes are bit-identical to those of ``pyautoattack.AutoAttack``. This
module adds what that code leaves to its caller: the model and all random states stay as found, networks with few
classes and images of any shape are attacked too, and ``remarks`` says where that departs from what is published.
Who is attacked, and what counts as fallen, is the business of ``evaluate``.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torch.nn import functional as F

from toughen.errors import InputError, check_choices
from toughen.layers.taps import buffers_kept, mode, without_weight_gradients
from toughen.types import Norm, ThreatModel

Logits = Callable[[Tensor], Tensor]

_NORMS: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}

# APGD tells a logger of samples without gradient; here that is the business of the checks for masked gradients
_SILENT = logging.Logger("pyautoattack", level=logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class Published(ABC):
    """What the attacks of AutoAttack share.

    Args:
        threat: The allowed perturbations, in [0, 1].
        restarts: Runs from different random starts, at least 1, each on the samples that still stand.

    Raises:
        InputError: A setting is out of its range.
    """

    reseeds: ClassVar[bool] = True  # every chunk of images starts from the evaluation's seed itself
    libraries: ClassVar[tuple[str, ...]] = ("pyautoattack",)

    threat: ThreatModel
    restarts: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if tuple(self.threat.bounds) != (0, 1):
            raise InputError(f"{name} takes images in [0, 1] only; bounds are {self.threat.bounds}: rescale the images")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"{name} {setting.name} is {value}; it must be at least 1")
        check_choices(self, where=name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Attack images, and leave the model and all random states exactly as found.

        Args:
            model: Maps [B, C, H, W] images to [B, K] logits; attacked in eval mode.
            x: [B, C, H, W], float, in [0, 1].
            y: [B], int64 labels.
            generator: Its initial seed becomes that of the attack; nothing is drawn from it.

        Returns:
            x_adv, detached: inside the ball and the box where the attack broke a sample, else the image itself, also
            where the model errs already.
        """
        if not len(x) or not self.threat.eps:
            return x.detach().clone()
        images = x.detach().float().contiguous()  # the library reshapes by view
        with (
            mode(model, training=False),
            without_weight_gradients(model),
            buffers_kept(model),
            _random_states_kept(),
            torch.no_grad(),
        ):
            num_classes = model(x).shape[1]

            def logits(z: Tensor) -> Tensor:
                if not len(z):  # Square asks about no image at all where the last ones are ties
                    return z.new_zeros(0, num_classes)
                found: Tensor = model(z.to(x.dtype))
                return found.float().clone()  # Square overwrites what it is given

            x_adv = self._search(logits, images, y, num_classes=num_classes, seed=generator.initial_seed())
        return x_adv.detach().to(x.dtype)

    def remarks(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
        """Say where the attack departs from its published form on such a model and such images.

        Args:
            num_classes: K.
            image_shape: (C, H, W).

        Returns:
            One sentence each; nothing where the attack is as published.
        """
        return ()

    def _search(self, logits: Logits, x: Tensor, y: Tensor, *, num_classes: int, seed: int) -> Tensor:
        threat = {"norm": _NORMS[self.threat.norm], "eps": self.threat.eps}
        attack = self._library(logits, num_classes, n_restarts=self.restarts, seed=seed, device=x.device, **threat)
        x_adv: Tensor = attack.perturb(x, y)
        return x_adv

    @abstractmethod
    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        """Make the library's object of this attack."""


@dataclass(frozen=True, kw_only=True)
class APGD(Published):
    """Projected gradient ascent that sets its own step size.

    Args:
        loss: What is maximised: cross-entropy, or the difference of logits ratio.
        steps: At least 1.
    """

    loss: Literal["ce", "dlr"] = "ce"
    steps: int = 100

    def remarks(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
        """See ``Published.remarks``."""
        if self.loss == "dlr" and num_classes < 3:
            return (f"the DLR loss needs 3 classes and there are {num_classes}: APGD maximises the margin instead",)
        return ()

    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        return _APGD(logits, loss=self.loss, n_iter=self.steps, logger=_SILENT, **common)


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(Published):
    """APGD on the targeted DLR loss, towards each of the likeliest wrong classes in turn.

    Args:
        targets: Number of wrong classes, at least 1.
        steps: For each of them, at least 1.
    """

    targets: int = 9
    steps: int = 100

    def remarks(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
        """See ``Published.remarks``."""
        few = _few_targets(self.targets, num_classes, who="APGD-T")
        if num_classes < 4:
            instead = "APGD-T maximises the margin to the target instead"
            return (f"the targeted DLR loss needs 4 classes and there are {num_classes}: {instead}", *few)
        return few

    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        targets = min(self.targets, num_classes - 1)
        return _TargetedAPGD(logits, n_target_classes=targets, n_iter=self.steps, logger=_SILENT, **common)


@dataclass(frozen=True, kw_only=True)
class FAB(Published):
    """Fast adaptive boundary attack: the nearest error that it finds, given up where that is farther than eps.

    One backward pass for every class and step.

    Args:
        steps: At least 1.
    """

    steps: int = 100

    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        return FABAttack_PT(logits, n_iter=self.steps, targeted=False, **common)


@dataclass(frozen=True, kw_only=True)
class TargetedFAB(Published):
    """FAB towards each of the likeliest wrong classes in turn, until one of them lies within eps.

    Args:
        targets: Number of wrong classes, at least 1.
        steps: For each of them, at least 1.
    """

    targets: int = 9
    steps: int = 100

    def remarks(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
        """See ``Published.remarks``."""
        return _few_targets(self.targets, num_classes, who="FAB-T")

    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        targets = min(self.targets, num_classes - 1)
        return FABAttack_PT(logits, n_iter=self.steps, targeted=True, n_target_classes=targets, **common)


@dataclass(frozen=True, kw_only=True)
class Square(Published):
    """Random search by squares: black box, no gradients.

    The share of pixels in a square falls at fixed queries, whatever their number is, as AutoAttack does it.

    Args:
        queries: For each sample, at least 1.
        p_init: Share of the pixels that the first squares change, in (0, 1].
    """

    queries: int = 5000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p_init <= 1:
            raise InputError(f"Square p_init is {self.p_init!r}; it must be in (0, 1], a share of the pixels")

    def remarks(self, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
        """See ``Published.remarks``."""
        height, width = image_shape[-2:]
        found = []
        if height != width:
            found.append(f"Square is published for square images; on {height} x {width} it may be weaker")
        if self.threat.norm == "l2" and not _tiled(height, width):
            side = _tiled_side(height, width)
            what = f"Square in l2 can't lay its first tiles on {height} x {width}"
            found.append(f"{what}: it searches on {side} x {side}, of which the model sees the image")
        return tuple(found)

    def _search(self, logits: Logits, x: Tensor, y: Tensor, *, num_classes: int, seed: int) -> Tensor:
        height, width = x.shape[-2:]
        if self.threat.norm != "l2" or _tiled(height, width):
            return super()._search(logits, x, y, num_classes=num_classes, seed=seed)
        side = _tiled_side(height, width)
        canvas = F.pad(x, (0, side - width, 0, side - height), value=0.5)

        def logits_of_canvas(z: Tensor) -> Tensor:
            return logits(z[..., :height, :width])

        x_adv = super()._search(logits_of_canvas, canvas, y, num_classes=num_classes, seed=seed)
        return x_adv[..., :height, :width].contiguous()

    def _library(self, logits: Logits, num_classes: int, **common: Any) -> Any:
        return SquareAttack(logits, n_queries=self.queries, p_init=self.p_init, resc_schedule=False, **common)


def standard(threat: ThreatModel) -> tuple[tuple[str, Published], ...]:
    """Return AutoAttack's standard version, in its order, each to be run on what the ones before left standing."""
    return (
        ("apgd-ce", APGD(threat=threat, loss="ce")),
        ("apgd-t", TargetedAPGD(threat=threat)),
        ("fab-t", TargetedFAB(threat=threat)),
        ("square", Square(threat=threat)),
    )


def paper(threat: ThreatModel) -> tuple[tuple[str, Published], ...]:
    """Return AutoAttack as the CLAT paper sets it: the standard version with 3 targets in FAB-T instead of 9."""
    stages = dict(standard(threat)) | {"fab-t": TargetedFAB(threat=threat, targets=3)}
    return tuple(stages.items())


class _APGD(APGDAttack):  # type: ignore[misc]
    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the DLR loss of logits [B, K], with 2 classes its numerator, [B]."""
        loss: Tensor = super().dlr_loss(x, y) if x.shape[1] >= 3 else _chosen(x, 1 - y) - _chosen(x, y)
        return loss


class _TargetedAPGD(APGDAttack_targeted):  # type: ignore[misc]
    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the targeted DLR loss of logits [B, K], with fewer than 4 classes its numerator, [B]."""
        few = x.shape[1] < 4
        loss: Tensor = _chosen(x, self.y_target) - _chosen(x, y) if few else super().dlr_loss_targeted(x, y)
        return loss


def _chosen(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _few_targets(targets: int, num_classes: int, *, who: str) -> tuple[str, ...]:
    if targets < num_classes:
        return ()
    return (f"{who} aims at {num_classes - 1} wrong classes instead of {targets}: there are {num_classes} classes",)


def _tiled(height: int, width: int) -> bool:
    """Whether the library can lay its first tiles (side: a fifth of the height) without one across the border."""
    side = height // 5
    if side < 2:
        return side == 1  # tiles of one pixel may lie outside: nothing happens there
    margin = (height - 5 * side) // 2
    return all(margin + size // side * side <= size for size in (height, width))


def _tiled_side(height: int, width: int) -> int:
    return 5 * math.ceil(max(height, width) / 5)


def _random_states_kept() -> AbstractContextManager[None]:
    # the library seeds torch as a whole: the GPUs that hold no part of the model too
    initialised = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialised else ()
    return torch.random.fork_rng(devices=devices)
