"""The runs of a sweep on Ray: as many at a time as there is room for, each retried from its checkpoint if it dies."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toughen.engine import Interrupted
from toughen.errors import InputError, Notice, first_line
from toughen.processes import sigterm_interrupts
from toughen.run_folder import RunFolder
from toughen.sweep import attempt
from toughen.sweep.attempt import Attempt, Outcome
from toughen.sweep.grid import Resources, Sweep
from toughen.sweep.store import OUTPUT, Progress, State, SweepFolder, resume_words, train_words
from toughen.sweep.watch import Watch

# -P, as for the command `toughen`: nothing is imported from the folder in which somebody happens to be
_TOUGHEN = ("-P", "-m", "toughen.cli.attempt")
_LOOK_EVERY = 0.5  # seconds
_ENDS: dict[str, State] = {"finished": "finished", "stopped": "stopped", "refused": "failed", "died": "failed"}
_STORE_BYTES = 80_000_000  # Ray's least, nearly: what is sent are a few words


@dataclass(frozen=True)
class Address:
    """Where to run.

    Args:
        cluster: ``"auto"``, ``"HOST:PORT"`` or ``"ray://HOST:PORT"`` of a Ray cluster; None starts Ray on this machine
            for as long as the sweep takes.
        workers: Runs at a time at most; None leaves it to the resources.

    Raises:
        InputError: Less than one worker.
    """

    cluster: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers is {self.workers}; it must be at least 1")


def train_all(sweep: Sweep, folder: SweepFolder, address: Address) -> list[Progress]:
    """Train what is not finished yet, each run in its folder, and keep ``sweep.json`` up to date.

    Raises:
        InputError: Ray is not there, or has no room for a single run.
        Interrupted: The process was asked to stop; every run at work has written its checkpoint.
    """
    with folder.held():
        runs = folder.lay_out(sweep)
        if all(one.state == "finished" for one in runs):
            return runs
        with _ray_at(address, sweep.resources) as ray, Watch(runs) as watch:
            _Schedule(ray, sweep, folder, runs, watch).work(address.workers or len(runs))
    return runs


class _Schedule:
    """What waits, and what is at work under which reference of Ray."""

    def __init__(self, ray: Any, sweep: Sweep, folder: SweepFolder, runs: Sequence[Progress], watch: Watch) -> None:
        self.ray, self.sweep, self.folder, self.runs, self.watch = ray, sweep, folder, runs, watch
        self.waiting = [one for one in runs if one.state == "waiting"]
        self.at_work: dict[Any, Progress] = {}
        self.log_sizes: dict[str, int] = {}
        self.stopping = False
        needed = sweep.resources
        ray.cloudpickle.register_pickle_by_value(attempt)
        self.task = ray.remote(attempt.make).options(num_cpus=needed.cpus, num_gpus=needed.gpus, max_retries=0)

    def work(self, at_once: int) -> None:
        try:
            with sigterm_interrupts():
                while self.waiting or self.at_work:
                    while self.waiting and len(self.at_work) < at_once:
                        self._start(self.waiting.pop(0))
                    self._look()
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted("Every run has its checkpoint. Continue with the same command") from None

    def _start(self, one: Progress) -> None:
        one.attempts += 1
        self.log_sizes[one.run.name] = _log_size(one)
        self.at_work[self.task.remote(_attempt(one, self.sweep))] = one

    def _look(self, seconds: float = _LOOK_EVERY) -> None:
        done, _ = self.ray.wait(list(self.at_work), timeout=seconds)
        for reference in done:
            self._end(self.at_work.pop(reference), self._outcome(reference))
        # Ray does not tell when a task that was handed to it begins
        begun = [one for one in self.at_work.values() if one.state == "waiting" and self._begun(one)]
        for one in begun:
            one.state = "running"
        if done or begun:
            self.folder.write(self.sweep, self.runs)
        self.watch.look()

    def _begun(self, one: Progress) -> bool:
        return _log_size(one) > self.log_sizes[one.run.name]

    def _outcome(self, reference: Any) -> Outcome:
        try:
            outcome: Outcome = self.ray.get(reference)
        except self.ray.exceptions.TaskCancelledError:
            return Outcome("stopped")
        except self.ray.exceptions.RayTaskError as error:
            return Outcome("refused", first_line(error.cause))
        except self.ray.exceptions.RayError as error:  # the process, or the machine, is gone
            return Outcome("died", first_line(error))
        return outcome

    def _end(self, one: Progress, outcome: Outcome) -> None:
        one.message = outcome.message
        if outcome.how == "died" and one.attempts <= self.sweep.retries and not self.stopping:
            self.watch.say(
                f"{one.run.name}: {outcome.message}; it goes on from its checkpoint"
                f" (retry {one.attempts} of {self.sweep.retries})"
            )
            one.state = "waiting"
            self.waiting.insert(0, one)
        else:
            one.state = _ENDS[outcome.how]

    def _stop(self) -> None:
        """Ask all runs at work for their checkpoints, and wait for these."""
        self.stopping = True
        self.watch.say("stopping: each run writes its checkpoint")
        for one in self.waiting:
            one.state = "stopped"
        self.waiting = []
        for reference in self.at_work:
            self.ray.cancel(reference)
        while self.at_work:
            self._look()


def _attempt(one: Progress, sweep: Sweep) -> Attempt:
    folder, here = one.folder.path.absolute(), Path.cwd()
    named = folder.relative_to(here) if folder.is_relative_to(here) else folder
    environment = {**sweep.environment, "PYTHONUNBUFFERED": "1"}
    return Attempt(
        begin=(*_TOUGHEN, *train_words(str(named))),
        resume=(*_TOUGHEN, *resume_words(str(named))),
        begun=str(RunFolder(folder).config_file),
        finished=str(RunFolder(folder).finished_file),
        output=str(folder / OUTPUT),
        owner=str(RunFolder(folder).lock_file),
        directory=str(here),
        environment=tuple(environment.items()),
    )


def _log_size(one: Progress) -> int:
    log = one.folder.path / OUTPUT
    return log.stat().st_size if log.exists() else 0


@contextmanager
def _ray_at(address: Address, needed: Resources) -> Iterator[Any]:
    """Ray, begun on this machine or found at its address; without its page, its statistics and its talk."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise InputError(
            'sweeps run on Ray, which is not installed: pip install "toughen[ray]" (--dry-run and --slurm work without)'
        ) from None
    ours = not ray.is_initialized()  # a program may have Ray already, and keeps it
    if ours:
        _begin(ray, address, needed)
    elif address.cluster not in (None, ray.get_runtime_context().gcs_address):
        raise InputError(
            f"Ray runs in this program already, at {ray.get_runtime_context().gcs_address}, so it can't be that of"
            f" {address.cluster}; leave the address out, or call ray.shutdown() first"
        )
    try:
        _check_room(ray, needed, cluster=address.cluster)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _begin(ray: Any, address: Address, needed: Resources) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address.cluster is not None:
            ray.init(address.cluster, **quiet)
            return
        # with a number of workers given, they may share cores
        cpus = max(os.cpu_count() or 1, math.ceil(address.workers * needed.cpus)) if address.workers else None
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except (ConnectionError, ImportError, ValueError, RuntimeError) as error:
        raise InputError(f"Ray can't be reached at {address.cluster or 'this machine'}: {first_line(error)}") from None


def _check_room(ray: Any, needed: Resources, *, cluster: str | None) -> None:
    """Refuse what would wait for ever; a cluster may have machines that it starts when they are asked for."""
    alive = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    rooms = [(room.get("CPU", 0), room.get("GPU", 0)) for room in alive]
    if any(needed.cpus <= cpus and needed.gpus <= gpus for cpus, gpus in rooms):
        return
    asked = f"a run takes resources cpus {needed.cpus:g}, gpus {needed.gpus:g}"
    if cluster is None:
        cpus, gpus = rooms[0]
        raise InputError(f"{asked}; this machine has cpus {cpus:g}, gpus {gpus:g}: ask for less, or give --address")
    warnings.warn(f"{asked}, and no machine of {cluster} has them now: runs wait for one", Notice, stacklevel=2)
