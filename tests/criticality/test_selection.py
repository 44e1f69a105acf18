"""Selection rules: the paper's and its controls."""

import pytest
import torch
from test_index import report, row

from toughen.criticality import CriticalityReport
from toughen.criticality.selection import SELECTORS, Fixed
from toughen.errors import InputError


def choose(rule, found, k, *, classifier=False, seed=0):
    rule = SELECTORS[rule]() if isinstance(rule, str) else rule
    return rule(found, k, classifier=classifier, generator=torch.Generator().manual_seed(seed))


def test_top_and_bottom_choose_by_the_index():
    assert choose("top", report(1.0, 3.0, 2.0), 2) == ("layer1", "layer2")
    assert choose("bottom", report(1.0, 3.0, 2.0), 2) == ("layer0", "layer2")
    assert choose("top", report(1.0, 3.0, 2.0), 1, classifier=True) == ("head",)


def test_random_is_reproducible_and_reaches_every_layer_but_the_classifier():
    found = report(1.0, 3.0, 2.0)
    assert choose("random", found, 2, seed=4) == choose("random", found, 2, seed=4)
    drawn = [choose("random", found, 2, seed=seed) for seed in range(60)]
    assert all(len(set(names)) == 2 for names in drawn)
    assert {name for names in drawn for name in names} == {"layer0", "layer1", "layer2"}


def test_random_does_not_depend_on_the_numbers():
    drawn = [
        [choose("random", found, 2, seed=seed) for seed in range(9)] for found in (report(1, 2, 3), report(3, 2, 1))
    ]
    assert drawn[0] == drawn[1]


def test_shape_only_ranks_by_the_ratio_of_sizes_alone():
    rows = (row(0, 9.0), row(1, 1.0, shape_ratio=0.5), row(2, 5.0, shape_ratio=4.0), row(3, 7.0, shape_ratio=0.5))
    assert choose("shape_only", CriticalityReport(rows), 4) == ("layer2", "layer1", "layer3", "layer0")


@pytest.mark.parametrize("rule", ["top", "bottom", "random", "shape_only"])
def test_every_rule_reaches_the_classifier_only_where_it_is_included(rule):
    found = report(1.0, 3.0, 2.0)
    assert "head" not in choose(rule, found, 3)
    assert "head" in choose(rule, found, 4, classifier=True)


def test_fixed_returns_what_was_named_in_that_order():
    assert choose(Fixed(("layer2", "head")), report(1.0, 3.0, 2.0), 2) == ("layer2", "head")


def test_fixed_refuses_an_unknown_layer_and_names_the_nearest():
    words = r"unknown layer 'layerr1'; did you mean 'layer1'.*; see `toughen list layers MODEL`"
    with pytest.raises(InputError, match=words):
        choose(Fixed(("layerr1",)), report(1.0, 3.0), 1)


def test_fixed_refuses_a_layer_without_a_single_feature():
    with pytest.raises(InputError, match="unknown layer 'layer1'"):
        choose(Fixed(("layer1",)), report(1.0, None), 1)


def test_fixed_refuses_another_number_of_layers():
    with pytest.raises(InputError, match="k is 2 but 1 layers are named"):
        choose(Fixed(("layer1",)), report(1.0, 3.0), 2)


@pytest.mark.parametrize(("rule", "layers"), [("top", 2), ("bottom", 2), ("random", 3), ("shape_only", 3)])
def test_every_rule_refuses_an_impossible_k(rule, layers):
    k = layers + 1
    words = f"k is {k}; this model has {layers} layers to choose from, so k must be 1 to {layers}"
    with pytest.raises(InputError, match=words):
        choose(rule, report(1.0, None, 2.0), k)


@pytest.mark.parametrize("rule", ["random", "shape_only"])
def test_controls_choose_where_no_layer_has_an_index(rule):
    assert len(choose(rule, report(None, None, None), 2)) == 2


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="unknown selection rule 'topp'; did you mean 'top'"):
        SELECTORS["topp"]
