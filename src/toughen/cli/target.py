"""What a verb works on: TARGET, as a model with its images and its threat model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from toughen import data, models
from toughen.cli.console import note
from toughen.config import Permission, network_of, recipe_of
from toughen.data import DataSplits
from toughen.engine import ModelSettings, Recipe, checkpoint, create_model, pick_device
from toughen.errors import InputError
from toughen.models import MODELS, Exported
from toughen.models.create import FOLDERS
from toughen.run_folder import RunFolder
from toughen.types import ThreatModel


class Target(NamedTuple):
    """A model with the images and the threat model that belong to it."""

    model: nn.Module
    splits: DataSplits
    threat: ThreatModel
    step_size: float
    seed: int
    batch_size: int = 250
    run: RunFolder | None = None
    epoch: int = 0
    remark: str = ""

    def say_remark(self) -> None:
        """Tell what the reader of the results must know; beside an error it would be a second line."""
        for line in (*self.splits.notes, self.remark):
            if line:
                note(line)


def find_target(options: argparse.Namespace) -> Target:
    """Resolve TARGET: a run folder, an exported one, a weights file with --model, or a model spec; --accurate mixes it.

    Raises:
        InputError: It is none of these, or an option does not go with it.
    """
    target = _found(options)
    if (options.accurate is None) != (options.alpha is None):
        raise InputError("--accurate RUN and --alpha A go together: TARGET gets the weight A, the network of RUN 1 - A")
    if options.accurate is None:
        return target
    settings = network_of(options.accurate, allow_code=options.allow_code)
    accurate = create_model(settings, target.splits).to(next(target.model.parameters()).device)
    mixture = models.mix(accurate, target.model, alpha=options.alpha, image_shape=target.splits.train.shape)
    return target._replace(model=mixture)


def _found(options: argparse.Namespace) -> Target:
    given = Path(options.target)
    if given.is_dir() and models.is_exported(given):
        return _exported(options, given)
    if given.is_dir() and not models.is_spec(options.target):
        return _run(options, RunFolder.open(given))
    if options.checkpoint is not None:
        raise InputError(f"--checkpoint chooses between the checkpoints of a run folder, and {given} is none")
    if given.is_file():
        return _model(options, _of_file(options, given))
    if options.model is not None:
        raise InputError(f"--model is for a weights file, and there is no file {given}")
    elsewhere = options.target.partition("/")[0] in FOLDERS  # then what is wrong is the name behind the slash
    if not (elsewhere or models.is_spec(options.target)) and (given.suffix or len(given.parts) > 1):
        raise InputError(f"{given} is neither a run folder, nor a weights file, nor a model: {', '.join(MODELS)}")
    try:
        models.check_spec(options.target)
    except InputError as error:
        if elsewhere:
            raise
        raise InputError(f"there is no run folder and no weights file {given}, and as a model: {error}") from None
    # what a function of the user returns has the weights that it gave
    trained = options.pretrained or options.target.startswith("hub/") or ":" in options.target
    random = "" if trained else f"{options.target} has random weights; give a run folder or a weights file"
    return _model(
        options, ModelSettings(name=options.target, width=options.width, pretrained=options.pretrained), remark=random
    )


def check_samples(samples: int, available: int, what: str) -> None:
    """Refuse a number of samples that there is not."""
    if not 1 <= samples <= available:
        raise InputError(f"--samples is {samples}; with {available} {what} images it must be 1 to {available}")


def _run(options: argparse.Namespace, run: RunFolder) -> Target:
    for flag in ("model", "width", "pretrained"):
        if getattr(options, flag, None):
            raise InputError(f"{run.path} is a run folder, which knows its model; leave --{flag} out")
    if options.image_size is not None and options.data is None:
        raise InputError("--image-size is for the images of --data; the run's own images keep their size")
    recipe = recipe_of(run, allow_code=options.allow_code)
    device = pick_device(options.device)
    splits = _splits(options, recipe)
    model = create_model(recipe.model, splits, start_weights=False)
    state = checkpoint.load(run.checkpoints / (options.checkpoint or "last"), model)
    threat, step_size = _threat(options, recipe)
    seed = recipe.train.seed if options.seed is None else options.seed
    return Target(model.to(device), splits, threat, step_size, seed, recipe.test_batch_size, run, state["epoch"])


def _exported(options: argparse.Namespace, folder: Path) -> Target:
    for flag in ("model", "width", "pretrained", "checkpoint"):
        if getattr(options, flag, None):
            raise InputError(f"{folder} is an exported network, which knows its model; leave --{flag} out")
    said = Exported.read(folder)
    Permission.of_user(str(folder), options.allow_code).check(said.model)
    if options.data is None and said.data != "digits":
        raise InputError(f"{folder} was trained on {said.data}; say where its images are with --data")
    splits = _splits(options, None)
    channels, classes = splits.train.shape[0], len(splits.train.classes)
    if (channels, classes) != (said.image_shape[0], len(said.classes)):
        raise InputError(
            f"{folder} takes {said.image_shape[0]} channels to {len(said.classes)} classes, and {splits.name} has"
            f" {channels} channels and {classes} classes; give other images with --data"
        )
    model = models.load(folder, allow_code=True).to(pick_device(options.device))
    models.check_fit(model, image_shape=splits.train.shape, num_classes=classes)
    threat = ThreatModel(norm=options.norm or said.norm, eps=said.eps if options.eps is None else options.eps)
    step_size = options.step_size
    if step_size is None:
        step_size = said.step_size if options.eps is None else threat.eps / 4
    return Target(model, splits, threat, step_size, options.seed or 0)


def _of_file(options: argparse.Namespace, file: Path) -> ModelSettings:
    if options.model is None:
        try:
            models.read_weights(file)
        except InputError as error:
            raise InputError(f"{error}; give a run folder, a weights file with --model, or a model by name") from None
        raise InputError(f"{file} is a file of weights; say of which model with --model, for example --model resnet18")
    if options.pretrained:
        raise InputError(f"--pretrained and the weights file {file} exclude each other; give one")
    models.check_spec(options.model)
    return ModelSettings(name=options.model, width=options.width, weights=str(file))


def _model(options: argparse.Namespace, settings: ModelSettings, *, remark: str = "") -> Target:
    device = pick_device(options.device)
    splits = _splits(options, None)
    threat, step_size = _threat(options, None)
    model = create_model(settings, splits).to(device)
    return Target(model, splits, threat, step_size, options.seed or 0, remark=remark)


def _splits(options: argparse.Namespace, recipe: Recipe | None) -> DataSplits:
    if options.data is None and recipe is not None:
        return data.load(replace(recipe.data, extra=None))
    # nothing is trained here, so one image is enough of a validation set
    return data.load(replace(data.parse_spec(options.data or "digits"), validation=1, image_size=options.image_size))


def _threat(options: argparse.Namespace, recipe: Recipe | None) -> tuple[ThreatModel, float]:
    eps = options.eps if options.eps is not None else (recipe.threat.eps if recipe else 8 / 255)
    norm = options.norm or (recipe.threat.norm if recipe else "linf")
    if options.step_size is not None:
        return ThreatModel(norm=norm, eps=eps), options.step_size
    return ThreatModel(norm=norm, eps=eps), recipe.test_step_size if recipe and options.eps is None else eps / 4
