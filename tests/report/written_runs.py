"""Run folders written by hand: no training, no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from toughen.run_folder import RunFolder

SETTINGS = {"threat": {"norm": "linf", "eps": 0.1}, "steps": 20}


def result(accuracy: float | Sequence[int], *, n: int = 1000, images: str = "digits", **changes: Any) -> dict[str, Any]:
    """An evaluation: the first images are right, or those that are given as 1."""
    if isinstance(accuracy, float):
        right = round(accuracy * n)
        correct = [1] * right + [0] * (n - right)
    else:
        correct = list(accuracy)
    facts = {"accuracy": sum(correct) / len(correct), "n": len(correct), "settings": {}, "seed": 0, "correct": correct}
    return {**facts, "epoch": 3, "images_sha256": images, **changes}


def row(epoch: int, **changes: Any) -> dict[str, Any]:
    """A line of the log."""
    return {
        "epoch": epoch,
        "method": "PGD-AT",
        "losses": {"loss": 2.0 / epoch, "clean_ce": 1.5 / epoch, "feature": 0.5 / epoch},
        "seconds": 2.0,
        "images_per_second": 500.0,
        "trainable_share": 1.0,
        "gflops_per_image": 3.0,
        "pgd_at_gflops_per_image": 3.0,
        "validation": {"clean": 0.1 * epoch, "robust": 0.05 * epoch, "n": 20},
        "training": {"clean": 0.12 * epoch, "robust": 0.07 * epoch, "n": 20},
        **changes,
    }


def write_evaluation(run: RunFolder, checkpoint: str, attack: str, result: dict[str, Any]) -> None:
    """Store one evaluation of a checkpoint, as the journal of an evaluation does."""
    run.evals(checkpoint).mkdir(parents=True, exist_ok=True)
    (run.evals(checkpoint) / f"{attack}.json").write_text(json.dumps(result))


def write_selection(run: RunFolder, epoch: int, criticality: dict[str, float | None], selected: list[str]) -> None:
    """Store the criticality of layers, the classifier last, as a training run does."""
    layers = [
        {"index": index, "name": name, "criticality": value, "classifier": index == len(criticality) - 1}
        for index, (name, value) in enumerate(criticality.items())
    ]
    run.write_report(epoch, {"epoch": epoch, "selected": selected, "layers": layers})


def write_examples(file: Path, classes: Sequence[str]) -> None:
    """Store two grey images of 4 x 4, of which the attack turns the second into another class."""
    x = np.full((2, 1, 4, 4), 0.5, dtype=np.float32)
    x_adv = x.copy()
    x_adv[1, 0, 0] += 0.1
    labels = {"label": [0, 1], "predicted": [0, 1], "predicted_adv": [0, 0]}
    arrays = {name: np.array(values) for name, values in labels.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"about": json.dumps({"attack": "pgd-20", "classes": list(classes)})}
    file.write_bytes(save({"x": x, "x_adv": x_adv, **arrays}, about))


def make(
    path: Path,
    *,
    data: str = "digits",
    seed: int = 0,
    recipe: str = "",
    branches: tuple[str, ...] = (),
    **accuracies: float | Sequence[int],
) -> RunFolder:
    """A finished run of a seed, evaluated with it; ``recipe`` tells recipes apart."""
    config = {"data": {"name": data}, "threat": {"norm": "linf", "eps": 0.1}, "train": {"epochs": 3, "seed": seed}}
    run = RunFolder.create(path, {**config, "description": recipe, "branches": dict.fromkeys(branches)}, {})
    run.write_log([row(1, seconds=9.0), row(2), row(3)])
    figures = {"clean": 0.812, "clean_best": 0.823, "pgd": 0.434, "pgd_best": 0.445, **accuracies}
    for checkpoint, suffix in (("last", ""), ("best", "_best")):
        clean, pgd = figures[f"clean{suffix}"], figures[f"pgd{suffix}"]
        write_evaluation(run, checkpoint, "clean", result(clean, images=data, seed=seed))
        write_evaluation(run, checkpoint, "pgd-20", result(pgd, settings=SETTINGS, images=data, seed=seed))
    return run


def make_family(path: Path, *, seed: int = 0, recipe: str = "", **branches: float) -> RunFolder:
    """A run with branches, by their accuracy under attack."""
    run = make(path, seed=seed, recipe=recipe, branches=tuple(branches))
    for name, accuracy in branches.items():
        make(run.branch(name).path, seed=seed, pgd=accuracy)
    return run
