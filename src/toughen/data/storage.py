"""How images are kept: decoded once and in memory, or decoded when they are needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from toughen.data.augment import ResizedCrop
from toughen.data.decode import Decoder, Encoded, check_size, decode, is_grey, size_of
from toughen.data.encoded import EncodedRows
from toughen.data.image_set import Images, ImageSet
from toughen.data.mapped import host_memory
from toughen.data.settings import DataSettings, Rows
from toughen.data.stream import PictureReader, StreamedSet
from toughen.errors import InputError

_GREY_LOOKS = 100  # pictures that are looked at to tell a grey data set, where not all are read


class Kept(NamedTuple):
    """The parts of a data set as they will be served, and what to tell about it, one line each."""

    train: Images
    validation: Images
    test: Images
    notes: tuple[str, ...] = ()


def keep(parts: Sequence[Rows], settings: DataSettings, device: torch.device) -> Kept:
    """Decode everything once, if it fits into memory, or leave it to be decoded when it is needed.

    Args:
        parts: The rows for training, validation and test: all in memory already, or all encoded.
        settings: Size, channels and ``storage``.
        device: Where training will be; its memory counts.

    Raises:
        InputError: Images that cannot be decoded, differ in size, or neither fit nor can be streamed.
    """
    encoded = [part for part in parts if isinstance(part, EncodedRows)]
    if not encoded:
        if settings.storage == "streamed":
            raise InputError(
                f"data.storage is 'streamed', and {settings.name!r} comes as a whole in memory; leave data.storage out"
            )
        train, validation, test = (_brought_to_form(part, settings) for part in parts if isinstance(part, ImageSet))
        return Kept(train, validation, test)
    height, width = (settings.image_size,) * 2 if settings.image_size else _first_size(encoded[0], settings)
    needed = sum(map(len, parts)) * 3 * height * width
    allowed = settings.resident_share * _memory(device)
    if settings.storage == "resident" or (settings.storage == "auto" and needed <= allowed):
        return _resident(encoded, settings)
    if settings.image_size is None and settings.storage == "streamed":
        raise InputError("data.storage is 'streamed', which needs data.image_size: all images are brought to it")
    if settings.image_size is None:
        raise InputError(
            f"{sum(map(len, parts))} images of {width}x{height} need {needed / 2**30:.1f} GiB, and data.resident_share"
            f" allows {allowed / 2**30:.1f}; set data.image_size, so that they can be streamed"
        )
    return _streamed(encoded, settings)


def _resident(parts: Sequence[EncodedRows], settings: DataSettings) -> Kept:
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
    notes = [f"images are kept in memory as uint8 ({size / 2**20:.1f} MiB)", *_told(skipped)]
    if any(isinstance(member, ResizedCrop) for member in settings.augment) and settings.image_size is not None:
        notes.append(
            f"resized_crop cuts from the images at {settings.image_size} pixels;"
            " data.storage=streamed cuts from the files"
        )
    return Kept(train, validation, test, tuple(notes))


def _streamed(parts: Sequence[EncodedRows], settings: DataSettings) -> Kept:
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
    return Kept(train, validation, test, (f"images are streamed by {settings.num_workers} worker processes",))


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
