import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from toughen.errors import InputError
from toughen.statistics import Interval, compare_paired, compare_seeds, over_seeds, wilson_interval

Z = 1.959963984540054


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Two networks on the same images, from how many each gets right."""
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


# -- one network --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 40), (7, 40), (20, 40), (40, 40), (9000, 10000)])
def test_wilsons_interval_has_its_closed_form(right, n):
    share = right / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    found = wilson_interval(right, n)
    assert (found.low, found.high) == pytest.approx((centre - reach, centre + reach), abs=1e-12)


def test_an_accuracy_of_everything_or_nothing_still_has_an_interval():
    all_right, none_right = wilson_interval(50, 50), wilson_interval(0, 50)
    assert all_right.high == 1.0
    assert all_right.low == pytest.approx(50 / (50 + Z**2))
    assert (none_right.low, none_right.high) == pytest.approx((1 - all_right.high, 1 - all_right.low), abs=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_wilsons_interval_covers_the_true_accuracy_about_as_often_as_it_says(share):
    right = np.arange(201)
    covers = [wilson_interval(k, 200).low <= share <= wilson_interval(k, 200).high for k in right]
    assert np.sum(stats.binom.pmf(right, 200, share)[covers]) == pytest.approx(0.95, abs=0.02)


def test_an_interval_reaches_to_its_farther_end():
    assert Interval(0.2, 0.7).reach(0.3) == pytest.approx(0.4)
    assert Interval(0.2, 0.7).reach(0.6) == pytest.approx(0.4)


# -- two networks on the same images ------------------------------------------------------------------


def test_the_paired_interval_is_the_published_one():
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): 1, 1, 7, 12 of 21 give -0.517 to -0.026 by Tango
    found = compare_paired(*outcomes(1, 1, 7, 12))
    assert found.difference == pytest.approx(-6 / 21)
    assert (found.interval.low, found.interval.high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert (found.only_first, found.only_second, found.n) == (1, 7, 21)


@pytest.mark.parametrize("n", [1, 30, 10000])
def test_two_networks_that_never_disagree_differ_by_nothing_give_or_take_the_images(n):
    found = compare_paired([True] * n, [True] * n)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert (found.interval.low, found.interval.high) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / (n + Z**2)))


def test_images_on_which_both_agree_do_not_matter_whether_right_or_wrong():
    assert compare_paired(*outcomes(90, 6, 2, 0)) == compare_paired(*outcomes(0, 6, 2, 90))


def test_exchanging_the_networks_turns_the_difference_round():
    for both, only_first, only_second in product((0, 5), (0, 1, 8), (0, 3)):
        first, second = outcomes(both, only_first, only_second, 1)
        there, back = compare_paired(first, second), compare_paired(second, first)
        assert there.p_value == back.p_value
        assert there.difference == -back.difference
        assert (there.interval.low, there.interval.high) == pytest.approx((-back.interval.high, -back.interval.low))
        assert -1 <= there.interval.low <= there.difference <= there.interval.high <= 1


def test_a_network_that_is_always_right_against_one_that_never_is():
    found = compare_paired([True] * 10, [False] * 10)
    assert found.difference == found.interval.high == 1.0
    assert 0 < found.interval.low < 1
    assert found.p_value == pytest.approx(2 / 2**10)


def test_the_p_value_is_that_of_the_exact_mcnemar_test():
    # all ways in which 9 coins fall that are no likelier than 1 of 9
    assert compare_paired(*outcomes(50, 1, 8, 3)).p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert compare_paired(*outcomes(50, 4, 4, 3)).p_value == 1.0


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.15, 0.05), (0.4, 0.1)])
def test_the_paired_interval_covers_the_true_difference_about_as_often_as_it_says(shares):
    n, true = 40, shares[0] - shares[1]
    covered = 0.0
    for only_first in range(n + 1):
        for only_second in range(n + 1 - only_first):
            rest = n - only_first - only_second
            chance = stats.multinomial.pmf([only_first, only_second, rest], n, [*shares, 1 - sum(shares)])
            if chance > 1e-6:
                interval = compare_paired(*outcomes(rest, only_first, only_second, 0)).interval
                covered += chance * (interval.low <= true <= interval.high)
    assert covered == pytest.approx(0.955, abs=0.025)


def test_pairing_makes_a_small_difference_visible():
    found = compare_paired(*outcomes(780, 20, 5, 195))
    apart = wilson_interval(800, 1000), wilson_interval(785, 1000)
    assert apart[1].high > apart[0].low
    assert found.interval.low > 0
    assert found.p_value < 0.005


# -- over seeds ---------------------------------------------------------------------------------------


def test_three_seeds_have_a_mean_a_spread_and_a_t_interval():
    found = over_seeds([0.70, 0.73, 0.76])
    reach = 4.302652729911275 * 0.03 / math.sqrt(3)  # t with 2 degrees of freedom
    assert found.mean == pytest.approx(0.73)
    assert found.sd == pytest.approx(0.03)
    assert (found.least, found.most) == (0.70, 0.76)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.73 - reach, 0.73 + reach))


def test_one_seed_has_no_spread_and_no_interval():
    found = over_seeds([0.7])
    assert (found.mean, found.least, found.most) == (0.7, 0.7, 0.7)
    assert found.sd is None
    assert found.interval is None


def test_equal_values_are_no_proof_that_there_is_no_spread():
    assert over_seeds([0.5, 0.5, 0.5]).interval is None
    assert compare_seeds({0: 0.973, 1: 0.970}, {0: 0.983, 1: 0.980}).interval is None  # equal but for rounding


def test_the_t_interval_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.6, 0.02, size=(2000, 3))
    intervals = [over_seeds(row.tolist()).interval for row in draws]
    covered = np.mean([found is not None and found.low <= 0.6 <= found.high for found in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_methods_are_paired_by_seed_whatever_the_order():
    found = compare_seeds({0: 0.50, 1: 0.60, 2: 0.71}, {2: 0.70, 1: 0.58, 0: 0.50, 7: 0.1})
    assert found.values == pytest.approx((0.0, 0.02, 0.01))
    paired = stats.ttest_rel([0.50, 0.60, 0.71], [0.50, 0.58, 0.70]).confidence_interval(0.95)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((paired.low, paired.high))


def test_what_a_seed_fixes_for_both_methods_cancels():
    with_, without = {0: 0.50, 1: 0.60, 2: 0.70}, {0: 0.48, 1: 0.59, 2: 0.68}
    apart = over_seeds(list(with_.values())).interval
    paired = compare_seeds(with_, without).interval
    assert apart is not None
    assert paired is not None
    assert paired.low > 0
    assert paired.high - paired.low < (apart.high - apart.low) / 10


# -- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: wilson_interval(0, 0), "got 0 of 0"),
        (lambda: compare_paired([True], [True, False]), "got 1 and 2"),
        (lambda: compare_paired([], []), "got 0 and 0"),
        (lambda: over_seeds([]), "at least one value"),
        (lambda: compare_seeds({0: 0.5}, {1: 0.5}), r"no seed in common: \[0\] and \[1\]"),
        (lambda: wilson_interval(1, 2, confidence=95), "between 0 and 1, got 95"),
    ],
    ids=["more than all", "no image", "unlike numbers", "no images", "no seed", "other seeds", "percent"],
)
def test_a_mistake_is_told_with_its_values(call, said):
    with pytest.raises(InputError, match=said):
        call()
