"""What a recipe is made of: its network, its batches, and a look at whether they fit each other."""

import warnings
from copy import deepcopy

import torch
from torch import nn

from toughen import data as datasets
from toughen import models, processes
from toughen.data import DataSplits, TrainLoader
from toughen.engine.recipe import MixtureSettings, ModelSettings, Recipe, TrainSettings
from toughen.errors import InputError, Notice
from toughen.methods import Stack


def check_methods(recipe: Recipe, model: nn.Module, data: DataSplits) -> None:
    """Refuse what this model or data can't serve before hours are spent, in the branches too.

    Raises:
        InputError: Names the setting, for example a ``k`` above the number of layers.
    """
    device = next(model.parameters()).device
    x = next(iter(datasets.in_order(data.train, batch_size=1, device=device))).x
    for member in (recipe, *recipe.branches.values()):
        _check_extra(member.method, data)
        _tell_what_never_begins(member)
        if member.attack.cuda_graph and not str(device).startswith("cuda"):
            warnings.warn("attack.cuda_graph changes nothing on a CPU", Notice, stacklevel=2)
        training_loader(member, data, device)
        # on a copy: binding may attach adapters
        member.method.bind(deepcopy(model), attack=member.attack, seed=member.train.seed).check(x)


def _tell_what_never_begins(recipe: Recipe) -> None:
    for method in recipe.method.methods:
        start = getattr(method, "start_epoch", 0)
        if start >= recipe.train.epochs:
            message = f"{method.label} never begins: its start_epoch is {start}, and train.epochs {recipe.train.epochs}"
            warnings.warn(message, Notice, stacklevel=2)


def _check_extra(method: Stack, data: DataSplits) -> None:
    """Refuse extra images that the methods can't use, and their absence where a method is about them."""
    for member in method.methods:
        if member.needs_extra and data.extra is None:
            raise InputError(f"{member.label} trains on extra images; name their file as data.extra.path")
    if data.extra is not None and not any(member.reads_unlabelled for member in method.methods):
        missing = int((data.extra.labels < 0).sum())
        if missing:
            raise InputError(
                f"{missing} of the extra images have no label (-1), from which {method.label} learns nothing;"
                " use trades or rst, or leave these images out"
            )


def create_model(
    settings: ModelSettings | MixtureSettings, data: DataSplits, *, seed: int = 0, start_weights: bool = True
) -> nn.Module:
    """Build the network for a data set: its classes, its channels, its statistics inside.

    Args:
        settings: Which network, or which two.
        data: What it is for.
        seed: Of the initial weights.
        start_weights: Whether to load the weights that the settings name; not when a checkpoint follows.

    Raises:
        InputError: The network cannot be built, its weights do not fit, or it does not take these images.
    """
    shape = data.train.shape
    if isinstance(settings, ModelSettings):
        return _create_network(settings, data, shape, seed=seed, start_weights=start_weights)
    side = settings.accurate_size
    resized = shape if side is None else (shape[0], side, side)
    accurate = _create_network(settings.accurate, data, resized, seed=seed, start_weights=start_weights)
    robust = _create_network(settings.robust, data, shape, seed=seed, start_weights=start_weights)
    return models.mix(accurate, robust, alpha="learned", image_shape=shape, seed=seed, options=settings)


def _create_network(
    settings: ModelSettings, data: DataSplits, shape: tuple[int, int, int], *, seed: int, start_weights: bool
) -> nn.Module:
    channels, height, width = shape
    model = models.create(
        settings.name,
        num_classes=len(data.train.classes),
        width=settings.width,
        in_channels=channels,
        image_size=height if height == width else None,
        mean=settings.mean,
        std=settings.std,
        data_statistics=(data.mean, data.std),
        seed=seed,
        pretrained=(settings.pretrained or None) if start_weights else False,
        weights=settings.weights if start_weights else None,
        classifier=settings.classifier if start_weights else "loaded",
    )
    models.check_fit(model, image_shape=shape, num_classes=len(data.train.classes))
    return model


def _rows_per_process(settings: TrainSettings) -> int:
    parts = processes.count() * settings.accumulate
    if settings.batch_size % parts:
        shares = "1 process" if processes.count() == 1 else f"{processes.count()} processes"
        raise InputError(
            f"train.batch_size={settings.batch_size} does not divide into {shares} times"
            f" train.accumulate={settings.accumulate}; set it to a multiple of {parts}"
        )
    return settings.batch_size // processes.count()


def training_loader(recipe: Recipe, data: DataSplits, device: torch.device | str) -> TrainLoader:
    """Return the training batches of a recipe, of several processes the part that is this one's.

    Raises:
        InputError: The batch size does not fit the data or the number of processes, the recipe names extra images that
            the data has not, or a method has to follow pixels through augmentations that change them.
    """
    if recipe.data.extra is not None and data.extra is None:
        raise InputError(
            f"data.extra is {recipe.data.extra.path}, and these images of your own come without; give them as"
            " DataSplits(..., extra=...)"
        )
    return datasets.train_loader(
        data,
        batch_size=_rows_per_process(recipe.train),
        device=device,
        seed=recipe.train.seed,
        augment=recipe.data.augmentations,
        extra_fraction=recipe.data.extra.fraction if recipe.data.extra else 0.0,
        workers=recipe.data.num_workers,
        share=processes.share(),
        track_pixels=any(method.needs_source for method in recipe.method.methods),
    )
