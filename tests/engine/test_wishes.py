"""Signals, as a training loop hears them."""

import os
import signal

import pytest

from toughen import processes
from toughen.engine.wishes import Wishes


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_signal_that_comes_while_the_processes_agree_is_heard_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, stops: bool
) -> None:
    wishes = Wishes()

    def meanwhile(mine: int) -> int:
        os.kill(os.getpid(), number)
        return mine

    with wishes.heard():
        with monkeypatch.context() as patch:
            patch.setattr(processes, "most", meanwhile)
            wishes.look()
        assert (wishes.save, wishes.stop) == (False, False)
        wishes.look()
        assert (wishes.save, wishes.stop) == (True, stops)
        wishes.look()
        assert (wishes.save, wishes.stop) == (False, stops)


def test_a_wish_to_stop_that_comes_after_the_last_look_is_not_lost() -> None:
    wishes = Wishes()

    def work() -> None:
        with wishes.heard():
            wishes.look()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        work()
