"""Plain values from YAML of anybody's."""

import pytest

from toughen.documents import parse_yaml
from toughen.errors import InputError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + below] * 10)}]\n" for name, below in zip("bcdefgh", "abcdefg", strict=True)
)


def test_plain_values_and_aliases_are_read() -> None:
    text = "base: &base {lr: 0.1, steps: [1, 2]}\nown: {<<: *base, lr: 5.0e-2}\nagain: *base\n"

    assert parse_yaml(text, what="recipe a") == {
        "base": {"lr": 0.1, "steps": [1, 2]},
        "own": {"lr": 0.05, "steps": [1, 2]},
        "again": {"lr": 0.1, "steps": [1, 2]},
    }
    assert parse_yaml("", what="recipe a") is None
    merged = "a: {in: &in {<<: &low {lr: 1}, lr: 2}}\nb: {<<: *in}\n"  # a merged key may be set once more
    assert parse_yaml(merged, what="recipe a") == {"a": {"in": {"lr": 2}}, "b": {"lr": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "recipe a stands for more than 100,000 values, through its aliases"),
        ("&a [*a]", "recipe a stands for more than 100,000 values"),
        ("[" * 100_000, "recipe a nests more than 50 levels"),
        ("a: " + "{a: " * 60, "recipe a nests more than 50 levels"),
        ("x" * (2**20 + 1), "recipe a has 1,048,577 letters; at most 1,048,576"),
        ("a: " + "9" * 5000, r"recipe a holds the number 99999999999999999999\.\.\., of more than 64 bits"),
        ("a: 0x" + "f" * 20, "recipe a holds the number 0xf"),
        ("a: 2001-13-45", "recipe a holds a value that is not of its kind: month must be in 1..12"),
        ("a: !!timestamp word", "recipe a holds a value that is not of its kind"),
        ("a: !!python/object/apply:os.system [ls]", "recipe a is not valid YAML: could not determine a constructor"),
        (
            "a: [",
            "recipe a is not valid YAML: expected the node content, but found .* in line 1, column 5$",
        ),
        ("runs:\n  a: {lr: 1}\n  a: {lr: 2}\n", "recipe a has the key 'a' twice in one mapping; rename or drop one"),
        ("{[1]: 2}", "recipe a is not valid YAML: found unhashable key in line 1, column 2$"),
    ],
    ids=lambda value: value[:20],
)
def test_what_no_recipe_needs_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_yaml(text, what="recipe a")
    assert len(str(caught.value).splitlines()) == 1


def test_a_message_is_one_line_that_a_terminal_shows_as_it_is() -> None:
    told = str(InputError("no class 'cat\n\x1b[2Jdog\u202e'"))

    assert told == r"no class 'cat \x1b[2Jdog\u202e'"
    assert len(str(InputError("x" * 10**6))) < 2100
