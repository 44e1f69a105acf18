"""From settings to the parts of a data set: split, and kept in memory or streamed."""

from dataclasses import replace

import torch
from torch import Tensor

from toughen import rng
from toughen.data.decode import Decoder, Encoded, check_size, decode, is_grey, size_of
from toughen.data.encoded import EncodedRows
from toughen.data.generated import read_extra
from toughen.data.image_set import DataSplits, Images, ImageSet, check_labels
from toughen.data.mapped import host_memory
from toughen.data.settings import DATASETS, DataSettings, Rows
from toughen.data.stream import PictureReader, StreamedSet
from toughen.errors import InputError

_GREY_LOOKS = 100  # pictures that are looked at to tell a grey data set, where not all are read


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
    _check_classes(train_rows, settings)
    check_labels(test_rows.labels, test_rows.classes)
    validation, train = _split(train_rows, settings)
    parts = (train, validation, _first(test_rows, settings))
    kept, notes = _kept(parts, settings, torch.device(device))
    extra = None
    if settings.extra is not None:
        extra = read_extra(settings.extra.path, classes=kept[0].classes, image_shape=kept[0].shape)
        notes = (*notes, f"{len(extra)} extra images fill {settings.extra.fraction:g} of each training batch")
    return DataSplits(settings.name, *kept, extra=extra, notes=notes)


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


def _check_classes(rows: Rows, settings: DataSettings) -> None:
    check_labels(rows.labels, rows.classes)
    empty = (torch.bincount(rows.labels, minlength=len(rows.classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"{settings.name!r} has no training image of the class {rows.classes[empty[0]]!r} (label {empty[0]});"
            " remove the class or add images"
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


# -- in memory, or streamed ---------------------------------------------------------------------------


def _kept(
    parts: tuple[Rows, Rows, Rows], settings: DataSettings, device: torch.device
) -> tuple[tuple[Images, Images, Images], tuple[str, ...]]:
    """Return the parts as they will be served, and what to tell about it."""
    encoded = [part for part in parts if isinstance(part, EncodedRows)]
    if not encoded:
        if settings.storage == "streamed":
            raise InputError(
                f"data.storage is 'streamed', and {settings.name!r} comes as a whole in memory; leave data.storage out"
            )
        train, validation, test = (_brought_to_form(part, settings) for part in parts if isinstance(part, ImageSet))
        return (train, validation, test), ()
    height, width = (settings.image_size,) * 2 if settings.image_size else _first_size(encoded[0], settings)
    needed = sum(map(len, parts)) * 3 * height * width
    allowed = settings.resident_share * _memory(device)
    if settings.storage == "resident" or (settings.storage == "auto" and needed <= allowed):
        return _resident(encoded, settings)
    if settings.image_size is None:
        raise InputError(
            f"{sum(map(len, parts))} images of {width}x{height} need {needed / 2**30:.1f} GiB, and data.resident_share"
            f" allows {allowed / 2**30:.1f}; set data.image_size, so that they can be streamed"
        )
    return _streamed(encoded, settings)


def _resident(
    parts: list[EncodedRows], settings: DataSettings
) -> tuple[tuple[Images, Images, Images], tuple[str, ...]]:
    decoder = Decoder(image_size=settings.image_size, center=settings.center, channels=settings.channels)
    decoded = [decode(part.pictures, decoder, on_error=settings.on_error) for part in parts]
    for rows, found in zip(parts, decoded, strict=True):
        check_size(
            parts[0].pictures[0].name, decoded[0].images.shape[2:], rows.pictures[0].name, found.images.shape[2:]
        )
    channels = max(part.images.shape[1] for part in decoded)  # one grey-or-colour decision for all
    train, validation, test = (
        ImageSet(found.images.expand(-1, channels, -1, -1).contiguous(), rows.labels[found.positions], rows.classes)
        for rows, found in zip(parts, decoded, strict=True)
    )
    size = sum(part.images.numel() for part in (train, validation, test))
    skipped = [name for part in decoded for name in part.skipped]
    return (train, validation, test), (f"images are kept in memory as uint8 ({size / 2**20:.0f} MiB)", *_told(skipped))


def _streamed(
    parts: list[EncodedRows], settings: DataSettings
) -> tuple[tuple[Images, Images, Images], tuple[str, ...]]:
    size = settings.image_size
    assert size is not None
    channels = settings.channels or (1 if all(map(_looks_grey, parts)) else 3)
    decoder = Decoder(image_size=size, center=settings.center, channels=channels)
    train, validation, test = (
        StreamedSet(
            PictureReader(part.pictures, decoder),
            torch.arange(len(part)),
            part.labels,
            part.classes,
            (channels, size, size),
            settings.on_error,
        )
        for part in parts
    )
    return (train, validation, test), (f"images are streamed by {settings.num_workers} worker processes",)


def _first_size(rows: EncodedRows, settings: DataSettings) -> tuple[int, int]:
    for position in range(len(rows) - 1):
        try:
            return size_of(rows.pictures[position])
        except InputError:
            if settings.on_error == "raise":
                raise
    return size_of(rows.pictures[len(rows) - 1])


def _looks_grey(part: EncodedRows) -> bool:
    looks = (part.pictures[row] for row in range(min(_GREY_LOOKS, len(part))))
    return all(grey for grey in map(_grey_or_unknown, looks) if grey is not None)


def _grey_or_unknown(picture: Encoded) -> bool | None:
    try:
        return is_grey(picture)
    except InputError:  # named or skipped when it is its turn
        return None


def _brought_to_form(images: ImageSet, settings: DataSettings) -> ImageSet:
    """Bring images that are in memory already to the size and the channels of the settings."""
    if settings.channels == 3 and images.shape[0] == 1:
        images = ImageSet(images.images.expand(-1, 3, -1, -1), images.labels, images.classes)
    elif settings.channels == 1 and images.shape[0] != 1:
        raise InputError(f"data.channels is 1, and the images of {settings.name!r} have {images.shape[0]} channels")
    if settings.image_size is None:
        return images
    _, height, width = images.shape
    side = round(settings.center * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    middle = images.images[:, :, top : top + side, left : left + side]
    return replace(images, images=middle).resized(settings.image_size)


def _told(skipped: list[str]) -> tuple[str, ...]:
    if not skipped:
        return ()
    return (f"skipped {len(skipped)} images that cannot be decoded, the first is {skipped[0]}",)


def _memory(device: torch.device) -> int:
    """Bytes of memory of the host, or of the device if that has less."""
    if device.type != "cuda":
        return host_memory()
    return min(host_memory(), torch.cuda.get_device_properties(device).total_memory)
