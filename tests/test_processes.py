import pytest

from toughen import processes
from toughen.errors import InputError
from toughen.processes import shared


def mistake() -> int:
    raise InputError("met here")


def test_one_process_has_its_own_part_alone():
    assert shared(lambda: 7) == [7]
    assert shared(None) == []


def test_a_mistake_of_another_process_ends_this_one_too(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, InputError("met elsewhere")])
    with pytest.raises(InputError, match="met elsewhere"):
        shared(lambda: 7)


def test_a_mistake_is_handed_to_the_others_before_it_is_raised(monkeypatch):
    handed = []
    monkeypatch.setattr(processes, "gathered", lambda mine: handed.append(mine) or [mine])
    with pytest.raises(InputError, match="met here"):
        shared(mistake)
    assert [str(one) for one in handed] == ["met here"]
