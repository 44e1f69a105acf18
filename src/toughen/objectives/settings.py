"""What the settings of several objectives have in common: ranges, and what a row label says of them."""

import math

from toughen.errors import InputError


def check_weight(value: float, *, where: str) -> None:
    """Refuse what is no weight of a term of a loss.

    Args:
        value: The weight.
        where: Its name, for example ``"trades beta"``.

    Raises:
        InputError: It is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"{where} is {value!r}; it must be a finite number >= 0")


def check_label_smoothing(value: float, *, where: str) -> None:
    """Refuse a label smoothing that leaves nothing of the label.

    Args:
        value: Its s.
        where: The method, for example ``"trades"``.

    Raises:
        InputError: It is outside [0, 1).
    """
    if not 0 <= value < 1:
        raise InputError(f"{where} label_smoothing is {value!r}; it must be at least 0 and below 1, for example 0.1")


def smoothed_label(label: str, label_smoothing: float) -> str:
    """Return a row label that says which label smoothing is used, where there is any."""
    return f"{label} (label smoothing {label_smoothing:g})" if label_smoothing else label
