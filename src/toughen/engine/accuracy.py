"""What a run measures of its network: on held-out images after an epoch, on test images at its end."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from toughen import data as datasets
from toughen import processes
from toughen.data import DataSplits, Images
from toughen.engine import checkpoint
from toughen.engine.progress import attack_progress
from toughen.engine.recipe import Recipe
from toughen.evaluation import EvalAttack, Journal, evaluate, facts_of, keep_examples, parse_attack
from toughen.run_folder import RunFolder
from toughen.types import Batch


def validate(network: nn.Module, data: DataSplits, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Measure clean and robust accuracy, with the attack of the run.

    Returns:
        ``"validation"``: on the held-out part of the training data; ``"training"``: on as many images that the run
        trains on, unvaried and the same each time, so that the gap between the two can be seen grow. Each with ``n``.
    """
    seed, device = recipe.train.seed, _device(network)
    count = min(len(data.validation), len(data.train))
    trained = datasets.probe(
        data.train, count=count, seed=seed, position=0, device=device, batch_size=recipe.test_batch_size
    )
    attacks = [EvalAttack("clean", None), EvalAttack("robust", recipe.attack)]
    found = {}
    for part, batches in {"validation": in_order(data.validation, recipe, device), "training": trained}.items():
        results = evaluate(network, batches, attacks, seed=seed, sanity=False)
        found[part] = {**{name: result.accuracy for name, result in results.items()}, "n": results["clean"].n}
    return found


def evaluate_checkpoints(
    model: nn.Module, data: DataSplits, recipe: Recipe, folder: RunFolder
) -> dict[str, dict[str, float]]:
    """Measure the best and the last checkpoint on test images; what is on disk already is kept.

    Returns:
        The accuracies, in [0, 1], by checkpoint and attack.
    """
    wanted = recipe.evaluate
    attacks = [parse_attack(n, threat=recipe.threat, step_size=recipe.test_step_size) for n in wanted.attacks]
    images = data.test.subset(slice(wanted.samples))
    found = {}
    for name in ("best", "last"):
        state = checkpoint.load(folder.checkpoints / name, model)
        facts = {"checkpoint": name, "epoch": state["epoch"], **facts_of(model, images)}
        with attack_progress() as progress:
            results = evaluate(
                model,
                in_order(images, recipe, _device(model)),
                attacks,
                seed=recipe.train.seed,
                batch_size=recipe.test_batch_size,
                journal=Journal(folder.evals(name), facts),
                progress=progress if processes.rank() == 0 else None,
            )
        few = next(iter(in_order(images.subset(slice(8)), recipe, _device(model))))
        keep = partial(keep_examples, model, few, images.classes, attacks, folder.examples(name))
        processes.by_first(partial(keep, seed=recipe.train.seed))
        found[name] = {attack: result.accuracy for attack, result in results.items()}
    return found


def in_order(images: Images, recipe: Recipe, device: torch.device) -> Iterable[Batch]:
    """Return the batches of a run outside its training."""
    return datasets.in_order(images, batch_size=recipe.test_batch_size, device=device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
