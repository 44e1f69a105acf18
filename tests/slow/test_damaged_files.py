"""Bits flipped and files cut off at random, in every file of a run. ``pytest -m slow -s`` prints the counts."""

import random

import pytest

from damaged_runs import VERBS, Count, Victim


def test_every_file_damaged_three_times_is_made_good_or_refused_in_one_line(tmp_path, capsys):
    victim, draw, count = Victim(tmp_path, capsys.readouterr), random.Random(1), Count()
    for number, file in enumerate(victim.files * 3):
        verb = "train" if number % 6 == 5 else ("compare", "evaluate")[number % 2]
        victim.trial(file, verb, draw, count)
    assert count.tried >= 40
    assert count.lost == []
    assert count.tracebacks == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_what_was_damaged_at_random_is_made_good_or_refused_in_one_line(tmp_path, capsys, verb):
    victim, draw, count = Victim(tmp_path, capsys.readouterr), random.Random(0), Count()
    while count.tried < 400:
        victim.trial(draw.choice(victim.files), verb, draw, count)
    with capsys.disabled():
        print(f"\ntoughen {verb}: {count}")
    assert count.lost == []
    assert count.tracebacks == []
    assert count.survived > 50
    assert count.refused > 50
