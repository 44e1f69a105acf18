"""The automatic learning rate: when it is halved, from validation accuracies alone."""

from itertools import pairwise

import pytest

from toughen.engine.auto_rate import checkpoints, halvings

PUBLISHED = (16, 24, 28, 36, 40, 42, 44, 46, 48)
RISING = [float(epoch) for epoch in range(50)]


def test_the_checkpoints_of_fifty_epochs_are_the_published_ones():
    assert checkpoints(50) == PUBLISHED


@pytest.mark.parametrize("epochs", [1, 2, 5, 10, 100])
def test_checkpoints_of_other_lengths_lie_inside_the_run_and_none_comes_twice(epochs):
    places = checkpoints(epochs)
    assert all(0 < place < epochs for place in places)
    assert list(places) == sorted(set(places))


def test_checkpoints_scale_with_the_run():
    assert checkpoints(100) == tuple(2 * place for place in PUBLISHED)
    assert checkpoints(5) == (2, 3, 4)


def test_while_every_epoch_improves_the_rate_stays():
    assert halvings(RISING, 50) == []


def test_an_accuracy_that_stands_still_halves_the_rate_at_every_checkpoint():
    assert halvings([0.3] * 50, 50) == list(PUBLISHED)


def test_the_rate_is_halved_where_fewer_than_three_quarters_of_the_epochs_improve():
    stalls = [(12, []), (11, [16])]  # of the first 16 epochs, so many improve
    for improving, expected in stalls:
        accuracies = [min(epoch, improving - 1) for epoch in range(16)]
        assert halvings(accuracies, 50) == expected


def test_the_rate_is_halved_where_epochs_improve_without_reaching_the_best_again():
    peak = [*RISING[:15], 99.0, *RISING[16:24]]  # epoch 17 is worse than the peak, 18 to 24 improve
    assert halvings(peak, 50) == [24]


def test_after_a_halving_the_best_gets_one_window_to_come_back():
    stalled = [*[5.0] * 16, *range(-8, 0)]  # halved at 16; in the next window 7 of 8 epochs improve, below the best
    assert halvings(stalled, 50) == [16]
    assert halvings([*stalled, 1, 2, 3, 4], 50) == [16, 28]


def test_nothing_is_decided_before_the_first_checkpoint():
    assert halvings([], 50) == []
    assert halvings([0.3] * 15, 50) == []


def test_a_decision_never_changes_as_accuracies_are_added():
    accuracies = [0.3, 0.1, 0.4, 0.1, 0.5, 0.9, 0.2, 0.6, 0.5, 0.3]
    decided = [halvings(accuracies[:count], 10) for count in range(11)]
    for earlier, later in pairwise(decided):
        assert later[: len(earlier)] == earlier
    assert decided[-1]
