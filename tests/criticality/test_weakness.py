"""Weakness (Eq. 2): its formula, its precision, and sums that can be merged in any order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toughen.criticality import WeaknessSums, weakness


def features(seed=0, shape=(6, 3, 4, 2)):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


@pytest.mark.parametrize("norm", ["dim", "rms", "none", "relative"])
def test_each_norm_follows_its_formula(norm):
    clean, moved = features()
    for sample, found in zip(range(6), weakness(clean, moved, norm=norm).tolist(), strict=True):
        length = math.dist(clean[sample].flatten().tolist(), moved[sample].flatten().tolist())
        expected = {
            "dim": length / 24,
            "rms": length / math.sqrt(24),
            "none": length,
            "relative": length / math.hypot(*clean[sample].flatten().tolist()),
        }[norm]
        assert found == pytest.approx(expected, rel=1e-12)


def test_equal_features_have_no_weakness_even_where_they_are_zero():
    zeros = torch.zeros(3, 5)
    for norm in ("dim", "rms", "none", "relative"):
        assert torch.equal(weakness(zeros, zeros, norm=norm), torch.zeros(3, dtype=torch.float64))


def test_half_precision_features_are_reduced_in_float64():
    clean = torch.zeros(1, 10_000, dtype=torch.float16)
    found = weakness(clean, clean + 100, norm="none")
    assert found.dtype == torch.float64
    assert found.item() == 10_000.0


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((2, 0), (2, 0))])
def test_features_that_cannot_be_compared_are_refused(a, b):
    with pytest.raises(ValueError, match="can't be compared"):
        weakness(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("expectation", ["mean", "rms"])
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(0, 1e3), min_size=2, max_size=20), cut=st.integers(1, 19), data=st.data())
def test_values_in_two_parts_are_the_whole_in_any_order(expectation, values, cut, data):
    cut = min(cut, len(values) - 1)
    shuffled = data.draw(st.permutations(values))
    whole, parts = (WeaknessSums(["a"], expectation=expectation) for _ in range(2))
    whole.add("a", torch.tensor(values, dtype=torch.float64))
    for part in (shuffled[:cut], shuffled[cut:]):
        parts.add("a", torch.tensor(part, dtype=torch.float64))
    assert parts.means() == pytest.approx(whole.means(), rel=1e-12, abs=1e-300)
    assert parts.counts == whole.counts == {"a": len(values)}


def test_the_mean_and_the_root_mean_square():
    for expectation, expected in (("mean", 2.5), ("rms", math.sqrt(7.5))):
        sums = WeaknessSums(["a"], expectation=expectation)
        sums.add("a", torch.tensor([1.0, 2.0]))
        sums.add("a", torch.tensor([3.0, 4.0]))
        assert sums.means() == {"a": pytest.approx(expected)}


def test_sums_are_accumulated_in_float64():
    sums = WeaknessSums(["a"])
    for value in (1e8, 1.0, 1.0, 1.0, 1.0):
        sums.add("a", torch.tensor([value], dtype=torch.float32))
    assert sums.sums["a"].dtype == torch.float64
    assert sums.means()["a"] * 5 == 1e8 + 4
