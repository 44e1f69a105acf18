"""Black-box transfer: the images that fool one model, shown to every other one (Tables 3 and 4 of the paper)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.errors import InputError
from toughen.evaluation.evaluate import Attacked, Progress, as_evaluated, evaluate, shown
from toughen.evaluation.outcomes import Flag
from toughen.evaluation.sanity import check_transfer
from toughen.evaluation.suites import EvalAttack, check_attack
from toughen.types import Batches


@dataclass(frozen=True)
class TransferMatrix:
    """What every model makes of the images that were made against every other one.

    Attributes:
        attack: Its name.
        settings: As in ``EvalResult``.
        seed: Of all randomness.
        names: Of the models: rows are attackers, columns victims.
        clean: Per victim and sample, whether it is right on the clean image.
        correct: Per attacker, victim and sample, whether the victim is right on the clean image and on the perturbed
            one; the diagonal is the white-box result.
        flags: What was seen that does not fit together.
    """

    attack: str
    settings: dict[str, Any]
    seed: int
    names: tuple[str, ...]
    clean: tuple[tuple[bool, ...], ...]
    correct: tuple[tuple[tuple[bool, ...], ...], ...]
    flags: tuple[Flag, ...]

    @property
    def accuracy(self) -> list[list[float]]:
        """Share of samples on which the victim stands, [attacker][victim]."""
        return [[sum(found) / len(found) for found in row] for row in self.correct]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values (``correct``: 1 stands, 0 falls)."""
        return {
            "attack": self.attack,
            "settings": self.settings,
            "seed": self.seed,
            "names": list(self.names),
            "n": len(self.clean[0]),
            "clean_accuracy": [sum(found) / len(found) for found in self.clean],
            "accuracy": self.accuracy,
            "flags": [flag.to_dict() for flag in self.flags],
            "clean": [[int(right) for right in found] for found in self.clean],
            "correct": [[[int(right) for right in found] for found in row] for row in self.correct],
        }


def transfer(
    models: Mapping[str, nn.Module],
    batches: Batches,
    attack: EvalAttack,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TransferMatrix:
    """Attack each model and show the perturbed images to all.

    A single attack perturbs every image, also those that the attacker's own model gets wrong. A suite such as
    ``standard`` hands on what broke the attacker's model and leaves the other images clean, as AutoAttack does, so its
    transferred accuracies lie higher.

    Args:
        models: At least one, by name; on the same device, left as found.
        batches: As for ``evaluate``.
        attack: See ``parse_attack``.
        seed: Of all randomness.
        batch_size: Samples attacked at once; None takes the size of the first batch.
        progress: As for ``evaluate``.

    Returns:
        The matrix; memory beside it does not grow with the images.

    Raises:
        InputError: No models, an attack that changes nothing, or as ``evaluate``.
    """
    _check(models, attack)
    again = list(batches) if isinstance(batches, Iterator) else batches
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(as_evaluated(model))
        clean = _clean(models, again, batch_size)
        rows = [
            _row(
                attacker,
                models,
                clean,
                again,
                attack,
                seed=seed,
                batch_size=batch_size,
                progress=None if progress is None else _titled(progress, name),
            )
            for name, attacker in models.items()
        ]
    correct = tuple(tuple(tuple(column.tolist()) for column in row) for row in rows)
    accuracy = [[sum(column) / len(column) for column in row] for row in correct]
    return TransferMatrix(
        attack=attack.name,
        settings=attack.settings(),
        seed=seed,
        names=tuple(models),
        clean=tuple(tuple(found.tolist()) for found in clean.values()),
        correct=correct,
        flags=check_transfer(tuple(models), accuracy, len(correct[0][0])),
    )


def transfer_from(
    attacker: nn.Module,
    victims: Mapping[str, nn.Module],
    batches: Batches,
    attack: EvalAttack,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[bool, ...]]:
    """Attack one model and show the perturbed images to others: a row of the matrix of ``transfer``.

    Args:
        attacker: What the images are made on.
        victims: At least one, by name; on the same device as the attacker, left as found.
        batches: As for ``evaluate``.
        attack: See ``parse_attack``.
        seed: Of all randomness.
        batch_size: Samples attacked at once; None takes the size of the first batch.
        progress: As for ``evaluate``.

    Returns:
        By victim, for each sample whether the victim is right on the clean image and on the perturbed one.

    Raises:
        InputError: As ``transfer``.
    """
    _check(victims, attack)
    again = list(batches) if isinstance(batches, Iterator) else batches
    with ExitStack() as stack:
        for model in (attacker, *victims.values()):
            stack.enter_context(as_evaluated(model))
        clean = _clean(victims, again, batch_size)
        row = _row(attacker, victims, clean, again, attack, seed=seed, batch_size=batch_size, progress=progress)
    return {name: tuple(column.tolist()) for name, column in zip(victims, row, strict=True)}


def _check(models: Mapping[str, nn.Module], attack: EvalAttack) -> None:
    check_attack(attack)
    if not models or not attack.stages:
        raise InputError("a transfer needs at least one model, and an attack other than clean")


def _clean(models: Mapping[str, nn.Module], batches: Batches, batch_size: int | None) -> dict[str, Tensor]:
    """Whether each model is right on each clean image, by name."""
    found = {
        name: evaluate(model, batches, [EvalAttack("clean")], batch_size=batch_size, sanity=False)["clean"]
        for name, model in models.items()
    }
    return {name: torch.tensor(result.correct) for name, result in found.items()}


def _row(
    attacker: nn.Module,
    victims: Mapping[str, nn.Module],
    clean: Mapping[str, Tensor],
    batches: Batches,
    attack: EvalAttack,
    *,
    seed: int,
    batch_size: int | None,
    progress: Progress | None,
) -> list[Tensor]:
    """Whether each victim is right on each image before and after it was perturbed against the attacker."""
    row = [clean[name].clone() for name in victims]

    def show(attacked: Attacked) -> None:
        counts = attacked.broke if isinstance(attack.attack, tuple) else attacked.inside
        if not bool(counts.any()):
            return
        where = attacked.where[counts.cpu()]
        for column, victim in zip(row, victims.values(), strict=True):
            if victim is attacker:  # what evaluate found: in a smaller batch a borderline image may turn
                right = ~attacked.broke[counts]
            else:
                right, _, _ = shown(victim, attacked.x_adv[counts], attacked.y[counts])
            column[where] &= right.cpu()

    evaluate(
        attacker,
        batches,
        [attack],
        seed=seed,
        batch_size=batch_size,
        attack_all=not isinstance(attack.attack, tuple),
        sanity=False,
        on_attacked=show,
        progress=progress,
    )
    everyones = processes.gathered(row)
    return [torch.stack(column).all(dim=0) for column in zip(*everyones, strict=True)]


def _titled(progress: Progress, name: str) -> Progress:
    return lambda attack, done, total: progress(f"{name}: {attack}", done, total)
