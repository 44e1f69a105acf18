"""Settings by dotted keys, such as ``train.lr`` and ``method.0.name``: how overrides and grids change a recipe."""

import copy
from collections.abc import Iterable
from typing import Any

from toughen.errors import InputError


def set_keys(document: dict[str, Any], changes: Iterable[tuple[str, Any]]) -> None:
    """Set what dotted keys name, one after another; list items are addressed by number.

    Another ``model.name`` comes with its own width, unless ``model.width`` is set too.

    Args:
        document: A recipe as plain values, which is changed.
        changes: Pairs of a key and its value.

    Raises:
        InputError: A key leads into a value that has no keys, or to no item of a list.
    """
    changes = list(changes)
    for key, value in changes:
        _set(document, key, copy.deepcopy(value))
    given, model = {key for key, _ in changes}, document.get("model")
    if "model.name" in given and "model.width" not in given and isinstance(model, dict):
        model.pop("width", None)  # it was the width of the recipe's own network


def _set(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    place: Any = document
    for depth, key in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        place = place[_position(place, key, here)] if isinstance(place, list) else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise InputError(f"{path}: {here} is {place!r}, which has no keys")
    place[_position(place, last, path) if isinstance(place, list) else last] = value


def _position(place: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(place):
        raise InputError(f"{path}: {key!r} is not a position in a list of {len(place)}; use 0 to {len(place) - 1}")
    return int(key)
