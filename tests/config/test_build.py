from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toughen.config import build
from toughen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Settings inside settings."""

    size: int = 3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One parameter of each type that settings use."""

    rate: float
    count: int = 1
    limit: int | None = None
    names: tuple[str, ...] = ()
    auto: float | Literal["auto"] = "auto"
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def area(*, width: float, height: float = 2.0) -> float:
    return width * height


def test_a_dataclass_is_made_from_plain_values():
    made = build(Outer, {"rate": 1, "names": ["x", "y"], "inner": {"kind": "b"}, "limit": 4}, path="outer")
    assert made == Outer(rate=1.0, names=("x", "y"), inner=Inner(kind="b"), limit=4)


def test_a_function_is_called_with_checked_values_and_its_own_defaults():
    assert build(area, {"width": "3/2"}, path="area") == 3.0


def test_what_the_caller_gives_is_no_key():
    assert build(area, {"width": 2}, path="area", height=5.0) == 10.0
    with pytest.raises(InputError, match="unknown key in area: 'height'"):
        build(area, {"width": 2, "height": 1}, path="area", height=5.0)


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("0.5/2", 0.25), ("5e-2", 0.05)])
def test_a_number_may_be_a_fraction_or_a_power_of_ten_as_text(text, value):
    assert build(Outer, {"rate": text}, path="outer").rate == value


@pytest.mark.parametrize("text", ["8/0", "8/255/2", "-8/255", "1+1", "__import__('os')", "8/x", ""])
def test_no_other_text_is_a_number(text):
    with pytest.raises(InputError, match=r"outer\.rate"):
        build(Outer, {"rate": text}, path="outer")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": "fast"}, ("outer.rate", "'fast'", "valid number")),
        ({"rate": 1, "count": 1.5}, ("outer.count", "1.5", "integer")),
        ({"rate": 1, "count": "many"}, ("outer.count", "'many'", "integer")),
        ({"rate": 1, "count": None}, ("outer.count", "None", "integer")),
        ({"rate": 1, "count": True}, ("outer.count", "True", "number")),
        ({"rate": False}, ("outer.rate", "False", "number")),
        ({"rate": 1, "names": "x"}, ("outer.names", "'x'", "tuple")),
        ({"rate": 1, "names": [1]}, ("outer.names", "1", "string")),
        ({"rate": 1, "auto": "never"}, ("outer.auto", "'never'", "'auto'")),
        ({"rate": 1, "inner": {"size": "big"}}, ("outer.inner.size", "'big'", "integer")),
        ({"rate": 1, "inner": {"kind": "c"}}, ("outer.inner.kind", "'c'", "'a' or 'b'")),
        ({"rate": 1, "inner": 5}, ("outer.inner", "5")),
        ({}, ("outer.rate", "missing")),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_what_is_allowed(values, words):
    with pytest.raises(InputError) as refused:
        build(Outer, values, path="outer")
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


def test_several_wrong_values_are_named_at_once():
    with pytest.raises(InputError) as refused:
        build(Outer, {"rate": "a", "count": "b", "flag": "c"}, path="outer")
    assert all(name in str(refused.value) for name in ("outer.rate", "outer.count", "outer.flag"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, r"unknown key in outer: 'rat'; did you mean 'rate'\?.*inner"),
        ({"rate": 1, "inner": {"sizes": 1}}, r"unknown key in outer\.inner: 'sizes'; did you mean 'size'\?"),
        ({1: 2}, r"unknown key in outer: '1'"),
        ([1], r"outer is \[1\]; it must be a mapping"),
        (None, "outer is None; it must be a mapping"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(values, message):
    with pytest.raises(InputError, match=message):
        build(Outer, values, path="outer")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["rate", "count", "limit", "names", "auto", "flag", "inner", "other"]), junk))
def test_no_value_whatever_gives_anything_but_settings_or_one_clear_error(values: dict[str, Any]):
    try:
        made = build(Outer, values, path="outer")
    except InputError:
        return
    assert isinstance(made.count, int)
    assert isinstance(made.rate, float)
