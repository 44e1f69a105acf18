from pathlib import Path

import pytest

from conformance import EXAMPLES, PREFACE, line, row
from toughen.objectives import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "conformance.md"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_method_keeps_its_promises_as_the_table_says(name, tmp_path):
    cells = row(name, tmp_path)
    assert "NO" not in cells.values()
    assert line(name, cells) in PAGE.read_text().splitlines()


def test_the_page_holds_every_method_once_and_nothing_else():
    page = PAGE.read_text()
    assert page.startswith(PREFACE)
    rows = [text for text in page.splitlines() if text.startswith("| `")]
    assert [text.split("`")[1] for text in rows] == list(EXAMPLES)
    ours = {name for name, method in METHODS.items() if method.__module__.startswith("toughen.")}  # others may register
    assert set(EXAMPLES) == ours


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_rules_of_a_method_name_methods_that_exist(name):
    method = METHODS[name]
    assert {*method.conflicts, *method.before} <= set(METHODS)
