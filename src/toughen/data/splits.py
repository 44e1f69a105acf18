"""From settings to the three parts of a data set."""

import torch

from toughen import rng
from toughen.data.image_set import DataSplits, ImageSet
from toughen.data.settings import DATASETS, DataSettings, Rows
from toughen.errors import InputError


def load(settings: DataSettings) -> DataSplits:
    """Read a data set and split it.

    The training rows are permuted by the stream ``"split"`` of ``split_seed``: the first ``validation``
    are the validation set, the next ``train_samples`` (all of the rest when None) the training set. The
    test set is the first ``test_samples`` test rows. So a smaller part is always the start of a larger one.

    Raises:
        InputError: The source cannot be read, or has fewer images than asked for.
    """
    train_rows, test_rows = DATASETS[settings.name].read(settings)
    validation, train = _split(train_rows, settings)
    test = _first(test_rows, settings)
    if (size := settings.image_size) is not None:
        validation, train, test = (part.resized(size) for part in (validation, train, test))
    return DataSplits(settings.name, train, validation, test)


def _split(rows: Rows, settings: DataSettings) -> tuple[ImageSet, ImageSet]:
    """Return the validation rows and the training rows."""
    num_train = settings.train_samples
    if settings.validation + (num_train or 1) > len(rows):
        wanted = "at least 1 training image" if num_train is None else f"data.train_samples={num_train}"
        raise InputError(
            f"data.validation={settings.validation} and {wanted} do not fit in the"
            f" {len(rows)} training images of {settings.name!r}; set data.validation to less"
        )
    order = torch.randperm(len(rows), generator=rng.generator(settings.split_seed, "split"))
    validation, rest = order[: settings.validation], order[settings.validation :]
    return rows.subset(validation), rows.subset(rest[:num_train])


def _first(rows: Rows, settings: DataSettings) -> ImageSet:
    wanted = settings.test_samples
    if wanted is not None and wanted > len(rows):
        raise InputError(f"data.test_samples={wanted}, but {settings.name!r} has {len(rows)} test images")
    return rows.subset(slice(wanted))
