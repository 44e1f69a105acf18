"""Names of the runs of a grid: what differs, short enough to read and fit for a folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from toughen.run_folder import file_name

# no name has "=", since `toughen train` takes a word with one for an override
_LONGEST = 60  # characters of a value; a longer one is called by its place in the list


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or the whole key where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: key if ends.count(end) > 1 or end.isdecimal() else end for key, end in zip(keys, ends, strict=True)}


def value_names(key: str, values: Sequence[Any]) -> list[str]:
    """Name the values of a key, each differently: methods by their names, with settings only where these differ.

    Args:
        key: As it is written in names, for example ``"lr"``.
        values: Plain values, all different.
    """
    for settings in (False, True):
        named = [_named(key, value, settings=settings) for value in values]
        fit = all(0 < len(name) <= _LONGEST for name in named)
        if fit and len({name.casefold() for name in named}) == len(named):
            return named
    return [f"{key}-{number}" for number in range(len(values))]


def _named(key: str, value: Any, *, settings: bool) -> str:
    if _stacked(value):
        return _fit("+".join(_member(member, settings=settings) for member in value))
    return _fit(f"{key}-{_plain(value)}")


def _fit(text: str) -> str:
    return file_name(text).replace("=", "-")


def _stacked(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "name" in m for m in value)


def _member(member: Mapping[str, Any], *, settings: bool) -> str:
    own = {key: value for key, value in member.items() if key != "name"} if settings else {}
    return "-".join([str(member["name"]), *(f"{key}-{_plain(value)}" for key, value in own.items())])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{key}-{_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "-".join(_plain(inner) for inner in value)
    # as YAML writes it: null, true
    return str(yaml.safe_dump(value)).partition("\n")[0] if value is None or isinstance(value, bool) else str(value)
