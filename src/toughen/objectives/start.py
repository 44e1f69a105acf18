"""Where the search of TRADES and its descendants begins."""

from typing import Literal

import torch
from torch import Tensor

from toughen.attacks import Attack, gaussian_start
from toughen.errors import InputError
from toughen.types import Batch

Start = Literal["gaussian", "attack"]


def search_start(batch: Batch, start: Start, generator: torch.Generator) -> Tensor | None:
    """Return where an attack begins: at ``batch.start`` if that is given, else as ``start`` says.

    Args:
        batch: The clean images, perhaps with a start of their own.
        start: ``"gaussian"``: x + 0.001 N(0, 1). ``"attack"``: as the attack itself says, which is None.
        generator: Source of the noise.
    """
    if batch.start is None and start == "gaussian":
        return gaussian_start(batch.x, generator)
    return batch.start


def check_attack_moves(start: Start, attack: Attack, *, where: str) -> None:
    """Refuse to begin at the clean image a search for what is furthest from it: there the gradient is zero.

    Raises:
        InputError: ``start`` leaves the start to an attack that has none.
    """
    if start == "attack" and not getattr(attack, "random_start", True):
        raise InputError(
            f"{where} start='attack' with the attack's random_start=False never moves an image, since its goal has no"
            " gradient at the clean one; set random_start=True, or start='gaussian'"
        )
