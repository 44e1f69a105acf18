"""From plain values to settings: any callable with typed parameters is its own schema (checked by pydantic)."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from fractions import Fraction
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from toughen.errors import InputError, unknown

T = TypeVar("T")

FRACTION = re.compile(r"\s*\d+(\.\d+)?\s*/\s*\d+(\.\d+)?\s*")


def build(target: Callable[..., T], values: Any, *, path: str, **given: Any) -> T:
    """Call ``target`` with ``values`` as keyword arguments, checked against its annotations.

    Numbers may be written as fractions (``8/255``); nested dataclasses take mappings; text is never evaluated.

    Args:
        target: A dataclass or function with annotated parameters.
        values: A mapping from parameter names to plain values.
        path: Where the values stand in the recipe, for messages, for example ``"train"``.
        given: Further arguments that the recipe does not set.

    Raises:
        InputError: An unknown key, a missing key or a wrong type; one line that names every one of them.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{path} is {values!r}; it must be a mapping of keys to values")
    hints, schema = _schema(target, frozenset(given))
    for key in values:
        if key not in hints:
            raise unknown(f"key in {path}:", str(key), hints)
    prepared = {key: _prepare(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    try:
        checked = schema.model_validate(prepared)
    except ValidationError as error:
        reasons = dict.fromkeys(_explain(path, prepared, detail) for detail in error.errors())
        raise InputError("; ".join(reasons)) from None
    return target(**given, **{name: getattr(checked, name) for name in checked.model_fields_set})


@cache
def _schema(target: Callable[..., Any], given: frozenset[str]) -> tuple[dict[str, Any], type[BaseModel]]:
    """The annotation of each parameter that a recipe may set, and what checks their values."""
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if name not in given and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is inspect.Parameter.empty else None)
        for name, parameter in parameters.items()
    }
    schema = create_model("Settings", __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
    return {name: hints[name] for name in parameters}, schema


def _prepare(hint: Any, value: Any, path: str) -> Any:
    """Turn fractions into numbers where a number is expected, and mappings into nested dataclasses."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, bool) and bool not in options and {int, float} & set(options):
        raise InputError(f"{path} is {value!r}; it must be a number")  # pydantic would take True for 1
    if float in options and isinstance(value, str) and FRACTION.fullmatch(value):
        top, bottom = (Fraction(part.strip()) for part in value.split("/"))
        if bottom == 0:
            raise InputError(f"{path} is {value!r}, a division by zero")
        return float(top / bottom)
    for option in options:
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, Mapping):
            return build(option, value, path=path)
    return value


def _explain(path: str, values: Any, detail: Any) -> str:
    key = path
    for number, part in enumerate(detail["loc"]):
        # pydantic names the branch of a union behind the key; keys are what the user wrote
        if number > 0 and not (isinstance(values, Mapping) and part in values):
            break
        key, values = f"{key}.{part}", values.get(part)
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "value_error" and "error" in detail.get("ctx", {}):
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{key} is {detail['input']!r}: {message}"
