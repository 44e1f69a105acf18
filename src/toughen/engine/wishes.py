"""What a process is asked for from outside while it trains: to write a checkpoint, or to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from toughen import processes

_SAVE, _STOP = 1, 2
# a batch system can announce the end of a job by SIGUSR1, some time before
_SIGNALS = {signal.SIGINT: _STOP, signal.SIGTERM: _STOP, signal.SIGUSR1: _SAVE}


class Wishes:
    """Ctrl-C, SIGTERM (to stop) and SIGUSR1 (to write a checkpoint), which a loop fulfils after the step under way."""

    def __init__(self) -> None:
        self._heard: list[int] = []
        self.save = self.stop = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, a signal is a wish rather than the end; one to stop that nobody has looked at is the end after all.

        Raises:
            KeyboardInterrupt: There was one.
        """

        def ask(number: int, _frame: FrameType | None) -> None:
            self._heard.append(_SIGNALS[signal.Signals(number)])

        try:
            before = {number: signal.signal(number, ask) for number in _SIGNALS}
        except ValueError:  # not the main thread: the signals belong to somebody else
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if _STOP in self._heard:  # after the last look
            raise KeyboardInterrupt

    def look(self) -> None:
        """Let ``save`` and ``stop`` say what was asked for since; of several processes all say what one was asked."""
        mine = [*self._heard]
        del self._heard[: len(mine)]  # what comes meanwhile stays for the next look
        wish = processes.most(max(mine, default=0))
        self.save = wish >= _SAVE
        self.stop = self.stop or wish == _STOP
