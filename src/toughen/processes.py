"""The processes that work together, where ``torchrun`` started several; and how they are asked to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(mine: T | None) -> list[T]:
    """Return what each process has, in the order of their ranks, without those that have nothing (None)."""
    everyones: list[T | None] = [mine]
    if count() > 1:
        everyones = [None] * count()
        dist.all_gather_object(everyones, mine)
    return [one for one in everyones if one is not None]


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started know one another; each has a GPU of its own where there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")  # plain values travel, no gradients
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does: by a ``KeyboardInterrupt``, so that what is done can be kept."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the signals belong to somebody else
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
