"""The form in which a network is handed on: a folder of weights, and ``config.json``, which says what to build."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from torch import nn

from toughen.durable import write_text
from toughen.errors import InputError
from toughen.models.create import create
from toughen.types import Norm

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORM = 1


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What ``config.json`` says of a network.

    Attributes:
        model: Its spec, see ``create``.
        width: Channels of the first stage; None is the published network's.
        image_shape: Channels, height and width of the images, with pixels in [0, 1].
        mean: Channel means that it subtracts; None where it has no ``Normalize`` layer.
        std: Channel standard deviations.
        classes: Their names, in the order of the logits.
        data: Name of the data set that it was trained on.
        norm: Of the threat model that it was measured with.
        eps: Its radius, in pixel units of [0, 1].
        step_size: Of PGD there.
    """

    model: str
    width: int | None
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...]
    data: str
    norm: Norm
    eps: float
    step_size: float

    def write(self, folder: Path) -> None:
        """Write ``config.json`` into a folder.

        Raises:
            InputError: It can't be written.
        """
        content = {"toughen_network": _FORM, **asdict(self)}
        write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "Exported":
        """Read the ``config.json`` of a folder, which may be anybody's.

        Raises:
            InputError: There is none, it is damaged, or it is not of this form.
        """
        file = Path(folder) / CONFIG
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"can't read {file}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{file} is no JSON; copy the exported folder again") from None
        form = content.get("toughen_network") if isinstance(content, dict) else None
        if form is None:
            raise InputError(f"{file} was not written by `toughen export`")
        if form != _FORM:
            raise InputError(f"{file} is of form {form}, and this version of toughen reads {_FORM}; update toughen")
        try:
            return cls(**{field.name: _checked(field.name, content[field.name]) for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged: its entry {error} is missing, or of another kind") from None


def is_exported(folder: Path) -> bool:
    """Return whether a folder looks like one that ``toughen export`` wrote."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load(folder: str | Path, *, allow_code: bool = False) -> nn.Module:
    """Build the network of an exported folder, with its weights.

    Args:
        folder: Written by ``toughen export``; or a download of it, as of ``huggingface_hub.snapshot_download``.
        allow_code: Whether it may be a network of a package other than timm and torchvision, whose function is called.

    Returns:
        The network in eval mode: images in [0, 1] go in, logits come out.

    Raises:
        InputError: The folder is not of this form, names code that is not allowed, or its weights do not fit.
    """
    said = Exported.read(folder)
    if ":" in said.model and not allow_code:
        raise InputError(
            f"{folder} names code that is not toughen's, {said.model!r}, and to import it is to run it; if you trust"
            " it, give allow_code=True"
        )
    channels, height, width = said.image_shape
    model = create(
        said.model,
        num_classes=len(said.classes),
        width=said.width,
        in_channels=channels,
        image_size=height if height == width else None,
        mean=said.mean,
        std=said.std,
        pretrained=False,
        weights=Path(folder) / WEIGHTS,
    )
    return model.eval()


_KINDS: Mapping[str, Any] = {
    "model": str,
    "width": int | None,
    "image_shape": int,
    "mean": float | int,
    "std": float | int,
    "classes": str,
    "data": str,
    "norm": str,
    "eps": float | int,
    "step_size": float | int,
}


def _checked(name: str, value: Any) -> Any:
    """Return a value of its kind, with lists as tuples.

    Raises:
        TypeError: It is of another kind; says its name.
    """
    kind, many = _KINDS[name], name in ("image_shape", "mean", "std", "classes")
    if many and value is None and name in ("mean", "std"):
        return None
    items = value if many else [value]
    if not (isinstance(items, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in items)):
        raise TypeError(repr(name))
    if (name == "image_shape" and len(items) != 3) or (name == "norm" and value not in get_args(Norm)):
        raise TypeError(repr(name))
    return tuple(items) if many else value
