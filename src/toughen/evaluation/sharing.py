"""Work that the processes of an evaluation share; a mistake that one of them meets is everyone's."""

from collections.abc import Callable
from typing import TypeVar

from toughen import processes
from toughen.errors import InputError

T = TypeVar("T")


def shared(work: Callable[[], T] | None) -> list[T]:
    """Do this process's part, and return what each process made of its own, in the order of their ranks.

    Args:
        work: None where this process has nothing to do.

    Raises:
        InputError: One of them raised it; all do, since the others would wait for its part.
    """
    mine: T | InputError | None = None
    try:
        mine = None if work is None else work()
    except InputError as error:
        mine = error
    everyones: list[T | InputError] = processes.gathered(mine)
    found: list[T] = []
    for one in everyones:
        if isinstance(one, InputError):
            raise one
        found.append(one)
    return found
