"""The example images of a run as a page shows them: clean, attacked, and how they differ."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from toughen.errors import InputError

_SIDE = 64  # pixels; larger images are shown smaller


@dataclass(frozen=True)
class Example:
    """One image. The pictures are ``data:`` addresses.

    Attributes:
        clean: As it is.
        attacked: As the attack made it.
        difference: Amplified; grey is none.
        factor: By how much the difference is amplified.
        label: Its class.
        predicted: What the network says of the clean one.
        predicted_adv: What it says of the attacked one.
    """

    clean: str
    attacked: str
    difference: str
    factor: float
    label: str
    predicted: str
    predicted_adv: str


def read_examples(file: Path) -> tuple[str, list[Example]]:
    """Return the attack, and the images of a file that ``toughen.evaluation.keep_examples`` wrote.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            about = json.loads(stored.metadata()["about"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
        return about["attack"], [_example(arrays, number, about["classes"]) for number in range(len(arrays["x"]))]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{file} is damaged: it holds no example images ({type(error).__name__})") from None


def _example(arrays: dict[str, Any], number: int, classes: list[str]) -> Example:
    x, x_adv = arrays["x"][number], arrays["x_adv"][number]
    label, predicted, predicted_adv = (
        str(classes[int(arrays[name][number])]) for name in ("label", "predicted", "predicted_adv")
    )
    difference = x_adv - x
    largest = float(np.abs(difference).max())
    factor = 0.5 / largest if largest else 1.0
    clean, attacked, shown = (_picture(image) for image in (x, x_adv, 0.5 + factor * difference))
    return Example(clean, attacked, shown, factor, label, predicted, predicted_adv)


def _picture(image: Any) -> str:
    """A PNG of an image [C, H, W] in [0, 1], as an address that holds it."""
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) != 3 else pixels.transpose(1, 2, 0))
    if max(shown.size) > _SIDE:
        shown.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    shown.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
