"""From settings to the parts of a data set."""

import torch
from torch import Tensor

from toughen import rng
from toughen.data.generated import read_extra
from toughen.data.image_set import DataSplits, check_labels
from toughen.data.settings import DATASETS, DataSettings, Rows
from toughen.data.storage import keep
from toughen.errors import InputError


def load(settings: DataSettings, *, device: torch.device | str = "cpu") -> DataSplits:
    """Read a data set and split it.

    The training rows are put into a random order, the stream ``"split"`` of ``split_seed``, in which every start
    holds the classes in their shares: the first ``validation`` are the validation set, the next ``train_samples``
    (all of the rest when None) the training set. The test set is the first ``test_samples`` test rows. So a smaller
    part is always the start of a larger one.

    Args:
        settings: What to read and how to keep it.
        device: Where training will be; its memory decides whether the images can stay there.

    Raises:
        InputError: The source cannot be read, has fewer images than asked for, or a class without one.
    """
    train_rows, test_rows = DATASETS[settings.name].read(settings)
    _check_classes(train_rows.labels, train_rows.classes, settings)
    check_labels(test_rows.labels, test_rows.classes)
    validation, train = _split(train_rows, settings)
    kept = keep((train, validation, _first(test_rows, settings)), settings, torch.device(device))
    if settings.train_samples is None:  # a class may have gone with pictures that were skipped
        _check_classes(torch.cat([kept.train.labels, kept.validation.labels]), kept.train.classes, settings)
    extra, notes = None, kept.notes
    if settings.extra is not None:
        extra = read_extra(settings.extra.path, classes=kept.train.classes, image_shape=kept.train.shape)
        notes = (*notes, f"{len(extra)} extra images fill {settings.extra.fraction:g} of each training batch")
    return DataSplits(settings.name, kept.train, kept.validation, kept.test, extra=extra, notes=notes)


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return all positions in a random order of which every start holds each class in its share (within one image).

    Args:
        labels: [N], int64, from 0.
        generator: Draws the order.
    """
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    by_class = torch.argsort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(labels)) - starts[shuffled[by_class]]
    return order[torch.argsort((rank.double() + 0.5) / counts[shuffled], stable=True)]


def _check_classes(labels: Tensor, classes: tuple[str, ...], settings: DataSettings) -> None:
    check_labels(labels, classes)
    empty = (torch.bincount(labels, minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"{settings.name!r} has no training image of the class {classes[empty[0]]!r} (label {empty[0]}) that can be"
            " read; remove the class or add images"
        )


def _split(rows: Rows, settings: DataSettings) -> tuple[Rows, Rows]:
    """Return the validation rows and the training rows."""
    num_train = settings.train_samples
    if settings.validation + (num_train or 1) > len(rows):
        wanted = "at least 1 training image" if num_train is None else f"data.train_samples={num_train}"
        raise InputError(
            f"data.validation={settings.validation} and {wanted} do not fit in the"
            f" {len(rows)} training images of {settings.name!r}; set data.validation to less"
        )
    order = stratified_order(rows.labels, rng.generator(settings.split_seed, "split"))
    validation, rest = order[: settings.validation], order[settings.validation :]
    return rows.subset(validation), rows.subset(rest[:num_train])


def _first(rows: Rows, settings: DataSettings) -> Rows:
    wanted = settings.test_samples
    if wanted is not None and wanted > len(rows):
        raise InputError(f"data.test_samples={wanted}, but {settings.name!r} has {len(rows)} test images")
    return rows.subset(slice(wanted))
