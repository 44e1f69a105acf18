"""The index (Eq. 3) and the report: rankings, refusals, JSON, the printed table."""

import math
from dataclasses import replace
from io import StringIO

import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from toughen.criticality import CriticalityReport, LayerCriticality
from toughen.criticality.index import criticality
from toughen.errors import InputError


def row(index, value, **changes):
    defaults = {
        "index": index,
        "name": f"layer{index}",
        "num_features": 10 * (index + 1),
        "num_parameters": 5,
        "weakness": None if value is None else 0.1,
        "criticality": value,
        "shape_ratio": None if index == 0 else index / (index + 1),
        "num_samples": 8,
    }
    return LayerCriticality(**(defaults | changes))


def report(*values):
    rows = [row(index, value) for index, value in enumerate(values)]
    return CriticalityReport((*rows, row(len(rows), 99.0, name="head", classifier=True)), settings={"norm": "dim"})


@pytest.mark.parametrize(
    ("own", "before", "expected"),
    [
        (3.0, 2.0, 1.5),
        (0.0, 2.0, 0.0),
        (1.0, 0.0, None),
        (None, 1.0, None),
        (1.0, None, None),
        (1e300, 1e-300, None),
        (math.nan, 1.0, None),
        (1.0, math.nan, None),
    ],
)
def test_the_index_is_the_ratio_or_undefined(own, before, expected):
    assert criticality(own, before) == expected


def test_top_is_sorted_and_leaves_the_classifier_out():
    assert [r.name for r in report(1.0, 3.0, 2.0).top(2)] == ["layer1", "layer2"]
    assert [r.name for r in report(1.0, 3.0, 2.0).top(2, classifier=True)] == ["head", "layer1"]


def test_bottom_starts_at_the_least_critical():
    assert [r.name for r in report(1.0, 3.0, 2.0).bottom(2)] == ["layer0", "layer2"]


def test_ties_keep_the_order_of_execution():
    assert [r.index for r in report(1.0, 2.0, 2.0, 2.0).ranked()] == [1, 2, 3, 0]


def test_layers_without_an_index_are_not_ranked():
    assert [r.index for r in report(1.0, None, 2.0).ranked()] == [2, 0]


@pytest.mark.parametrize("k", [-1, 0, 3])
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_an_impossible_k_is_refused_with_the_range(k, side):
    with pytest.raises(InputError, match=rf"k is {k}; this model has 2 layers to choose from, so k must be 1 to 2"):
        getattr(report(1.0, 2.0), side)(k)


def test_a_report_without_any_movement_is_refused():
    still = CriticalityReport((row(0, 0.0, weakness=0.0), row(1, None, weakness=0.0)))
    with pytest.raises(InputError, match="the perturbed images equal the clean ones; is eps or step_size 0"):
        still.top(1)


numbers = st.one_of(st.none(), st.floats(0, 1e6))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, st.text(min_size=1)), min_size=1, max_size=5), st.lists(st.text()))
def test_json_gives_the_same_report_back(values, notes):
    rows = tuple(row(i, c, weakness=w, name=name) for i, (c, w, name) in enumerate(values))
    before = CriticalityReport(rows, tuple(notes), {"attack": "PGD-10", "exclude": [], "seed": 0})
    assert CriticalityReport.from_json(before.to_json()) == before


def test_save_writes_what_from_json_reads(tmp_path):
    before = report(1.0, None)
    before.save(tmp_path / "report.json")
    assert CriticalityReport.from_json((tmp_path / "report.json").read_text()) == before


def test_printing_shows_every_layer_with_its_numbers_and_every_note():
    noted = CriticalityReport(report(1.25, None, 123.456).rows, ("layer1: is odd", "[x]: " + "long " * 60))
    text = str(noted)
    for name in ("layer0", "layer1", "layer2", "head", "1.25", "123.5", "note: layer1: is odd"):
        assert name in text
    assert "note: [x]: " + "long " * 59 in text
    assert "cls" in text


def test_printing_does_not_cut_long_names():
    name = "encoder.layers.encoder_layer_11.self_attention.projections.out_proj_of_the_last_block.conv"
    assert name in str(CriticalityReport((row(0, 1e-9, name=name, num_features=123456789),)))


def test_printing_shows_names_that_look_like_markup():
    assert "blocks.[bold]" in str(CriticalityReport((row(0, 1.0, name="blocks.[bold]"),)))


def test_printing_returns_plain_text_in_a_notebook_and_with_forced_colours(monkeypatch):
    plain = str(report(1.0, 2.0))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert str(report(1.0, 2.0)) == plain


def test_selected_layers_are_marked_in_the_table():
    file = StringIO()
    rich.console.Console(width=120, file=file).print(report(1.0, 2.0).table(selected=["layer1"]))
    text = file.getvalue()
    assert "layer1 *" in text
    assert "layer0 *" not in text


def test_it_prints_every_layer_with_its_rank_and_what_it_was_measured_with():
    settings = {"attack": "PGD-7", "num_samples": 8, "norm": "dim", "measure": "weakness", "predecessor": "graph"}
    table, caption = str(replace(report(1.0, 3.0, None, 2.0), settings=settings)).split("┘")
    title, _, head, _, *body, _ = table.splitlines()
    assert title.strip() == "criticality"
    assert " ".join(caption.split()) == "measure weakness, norm dim, predecessor graph, attack PGD-7, num_samples 8"
    assert head.split("┃")[1:-1] == [
        " layer ", " name   ", " features ", " weakness ", " criticality ", " shape ratio ", " rank "
    ]  # fmt: skip
    assert [line.split("│")[1:-1] for line in body][:3] == [
        ["     0 ", " layer0 ", "       10 ", "      0.1 ", "           1 ", "           - ", "    3 "],
        ["     1 ", " layer1 ", "       20 ", "      0.1 ", "           3 ", "         0.5 ", "    1 "],
        ["     2 ", " layer2 ", "       30 ", "        - ", "           - ", "      0.6667 ", "    - "],
    ]
    assert [line.split("│")[-2].strip() for line in body] == ["3", "1", "-", "2", "-"]
