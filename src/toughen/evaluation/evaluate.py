"""Accuracy under attacks, per sample: a sample stands only if it is right when clean and under the attack."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.evaluation.suites import EvalAttack
from toughen.layers.taps import mode
from toughen.rng import generator
from toughen.types import Batches, check_images


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one attack.

    Attributes:
        attack: Its name.
        settings: Norm, eps, steps and so on, as plain values; empty for clean images.
        seed: Of its random starts.
        correct: Per sample, whether the model was right on the clean image and on the perturbed one.
    """

    attack: str
    settings: dict[str, Any]
    seed: int
    correct: tuple[bool, ...]

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of samples that stand, in [0, 1]."""
        return sum(self.correct) / len(self.correct)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the totals beside the outcome of every sample (1 stands, 0 falls)."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "n": self.n,
            "seed": self.seed,
            "settings": self.settings,
            "correct": [int(right) for right in self.correct],
        }


def evaluate(
    model: nn.Module,
    batches: Batches,
    attacks: Sequence[EvalAttack],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, EvalResult]:
    """Evaluate a model in eval mode; attacks run only on samples that the model gets right when clean.

    Args:
        model: Maps [B, ...] images in [0, 1] to logits; left as found.
        batches: (x, y) pairs (or ``Batch``); moved to the model's device.
        attacks: See ``parse_attack``.
        seed: Of the random starts; together with the batch's number it decides them.
        progress: Called with the number of samples done, after each batch.

    Returns:
        One result per attack, by name.

    Raises:
        InputError: No batches, images that are not finite or not in [0, 1], or an attack that is named twice.
    """
    names = [attack.name for attack in attacks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"attack {repeated[0]!r} is named twice; name each once")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outcomes: dict[str, list[Tensor]] = {name: [] for name in names}
    done = 0
    with mode(model, training=False):
        for number, (x, y, *_) in enumerate(batches):
            x, y = x.to(device), y.to(device)  # noqa: PLW2901
            check_images(x, (0.0, 1.0))
            clean = _right(model, x, y)
            for attack in attacks:
                stands = clean.clone()
                if attack.attack is not None and bool(clean.any()):
                    draw = generator(seed, attack.name, number, device=device)
                    x_adv = attack.attack(model, x[clean], y[clean], generator=draw)
                    stands[clean] = _right(model, x_adv, y[clean])
                outcomes[attack.name].append(stands.cpu())
            done += len(x)
            if progress is not None:
                progress(done)
    if not done:
        raise InputError("no images to evaluate: the batches are empty")
    return {
        attack.name: EvalResult(attack.name, _settings(attack), seed, tuple(torch.cat(outcomes[attack.name]).tolist()))
        for attack in attacks
    }


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    # argmax would pick a class among NaNs too
    right: Tensor = (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)
    return right


def _settings(attack: EvalAttack) -> dict[str, Any]:
    if attack.attack is None:
        return {}
    return asdict(attack.attack)  # type: ignore[call-overload, no-any-return]
