"""The processes that work together, where ``torchrun`` started several; and how they are asked to stop."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from toughen.errors import InputError
from toughen.rng import Share

T = TypeVar("T")


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def started() -> int:
    """Return how many processes ``torchrun`` started, also before they know one another."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share() -> Share:
    """Return the rows of a batch that are this process's."""
    return Share(rank(), count())


# -- what they tell one another: every process has to make the same calls in the same order ---------------------------


def gathered(mine: T | None) -> list[T]:
    """Return what each process has, in the order of their ranks, without those that have nothing (None)."""
    everyones: list[T | None] = [mine]
    if count() > 1:
        everyones = [None] * count()
        dist.all_gather_object(everyones, mine)
    return [one for one in everyones if one is not None]


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
    everyones: list[T | InputError] = gathered(mine)
    found: list[T] = []
    for one in everyones:
        if isinstance(one, InputError):
            raise one
        found.append(one)
    return found


def by_first(work: Callable[[], T]) -> T:
    """Let the first process do something, and return what came out of it to all.

    Raises:
        InputError: It raised it; all do.
    """
    [(found,)] = shared((lambda: (work(),)) if rank() == 0 else None)
    return found


def of_first(mine: T) -> T:
    """Return what the first process has, where all did the same and rounding may have made a difference."""
    return gathered((mine,))[0][0]


def most(mine: int) -> int:
    """Return the largest of the processes' numbers."""
    if count() == 1:
        return mine
    largest = torch.tensor([mine], device=_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def mean(value: float) -> float:
    """Return the mean of a number over the processes, added up in float64."""
    if count() == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return float(total.item() / count())


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes, in place; all of one type and on one device."""
    if count() == 1 or not tensors:
        return
    together = packed(tensors)
    dist.all_reduce(together)
    unpack(together / count(), tensors)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors of one type in one, without their gradients."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write what ``packed`` returned back into the tensors, in one go."""
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    with torch.no_grad():
        torch._foreach_copy_(list(tensors), [v.view(t.shape) for v, t in zip(parts, tensors, strict=True)])


def all_rows(mine: Tensor) -> Tensor:
    """Return the rows of all processes as they lie in the batch that was dealt out: [B, ...], all of one shape."""
    if count() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(count())]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def own_rows(whole: Tensor) -> Tensor:
    """Return the rows of a whole batch that are this process's: the inverse of ``all_rows``."""
    return whole[rank() :: count()]


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)


def spread(tensors: Iterable[Tensor]) -> None:
    """Let every process have the first one's tensors, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_agree(mine: object, what: str) -> None:
    """Stop where processes that must have come to the same result have not.

    Raises:
        InputError: They have not.
    """
    if any(theirs != mine for theirs in gathered(mine)):
        raise InputError(
            f"the processes disagree about {what}: {gathered(mine)}; are they of one version, and on like devices?"
        )


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


# -- beginning and stopping -------------------------------------------------------------------------------------------


def join() -> None:
    """Let the processes that ``torchrun`` started know one another; each has a GPU of its own where there are.

    Plain values travel over gloo also where there are GPUs, so that no device has to wait for them.

    Raises:
        InputError: They are more than the GPUs of this machine.
    """
    if started() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        here, there_are = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > there_are:
            raise InputError(
                f"torchrun started {here} processes on a machine with {there_are} GPUs, and each needs its own; set"
                f" --nproc-per-node {there_are}, or hide the GPUs to work on CPUs: CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, mine, everyone = next(rendezvous("env://"))
    # a restarted process would find the addresses of those before it in the store that torchrun keeps
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=mine, world_size=everyone)


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` started know one another, and not afterwards if they did not before."""
    if started() == 1 or dist.is_initialized():
        yield
        return
    join()
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does: by a ``KeyboardInterrupt``, so that what is done can be kept.

    SIGUSR1, by which a batch system asks for that, is no end: such work keeps what is done as it goes.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    meant: dict[signal.Signals, Any] = {signal.SIGTERM: interrupt, signal.SIGUSR1: signal.SIG_IGN}
    try:
        before = {number: signal.signal(number, handler) for number, handler in meant.items()}
    except ValueError:  # not the main thread: the signals belong to somebody else
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
