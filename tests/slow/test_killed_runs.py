"""Real runs, killed at random moments or out of room: whatever happens, they go on and end as if nothing had.

``pytest -m slow -s`` prints the counts.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from damaged_runs import Count
from small_runs import PGD_AT, clat, document, outcome
from toughen.cli import main
from toughen.run_folder import RunFolder

WORKER = Path(__file__).parents[1] / "engine" / "together.py"
SECTIONS = {"train": {"epochs": 4, "checkpoint_steps": 2}, "branch_epoch": 2, "branches": {"clat": clat(), "same": {}}}


class Runs:
    """``toughen train`` in processes of its own, forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(document(method=[PGD_AT], **SECTIONS)))
        started = time.monotonic()
        assert self.finish(folder / "whole") == (0, "")
        self.seconds = time.monotonic() - started
        self.wanted = outcome(RunFolder(folder / "whole"))

    def start(self, run: Path) -> int:
        """Begin a run, or go on with it, and return the process."""
        begun = (run / "config.yaml").exists()
        words = ["train", "--resume", str(run)] if begun else ["train", str(self.recipe), "--out", str(run)]
        pid = os.fork()
        if pid:
            return pid
        for stream in (1, 2):
            os.dup2(os.open(run.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os._exit(main(words))

    def finish(self, run: Path) -> tuple[int, str]:
        """Let a run come to its end; return its status, and what it said if that is not 0."""
        said = run.with_suffix(".said")
        said.unlink(missing_ok=True)
        _, status = os.waitpid(self.start(run), 0)
        code = os.waitstatus_to_exitcode(status)
        return code, said.read_text() if code else ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def killed(runs: Runs, run: Path, draw: random.Random, count: Count, *, times: int) -> None:
    """Kill a run at random moments, let it go on, and count what comes of it."""
    count.tried += 1
    kinds = draw.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), weights=(3, 1, 1), k=times)
    for kind in kinds:
        if RunFolder(run).finished:
            break
        pid = runs.start(run)
        time.sleep(draw.uniform(0.02, runs.seconds))
        os.kill(pid, kind)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, 130, -kind):  # SIGTERM ends a process that has not begun to train
            count.lost.append(f"{run.name}: {kind.name} ended it with {code}")
    said = run.with_suffix(".said")
    if "Traceback" in said.read_text():
        count.tracebacks.append(f"{run.name}: {said.read_text()[-2000:]}")
    code, text = (0, "") if RunFolder(run).finished else runs.finish(run)
    if code or outcome(RunFolder(run)) != runs.wanted:
        count.lost.append(f"{run.name} after {[kind.name for kind in kinds]}: status {code}, {text[-2000:]}")
    else:
        count.survived += 1


def check(count: Count, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {count}")
    assert count.lost == []
    assert count.tracebacks == []


def test_a_few_runs_killed_at_random_end_as_if_they_had_not_been(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, draw = Count(), random.Random(5)
    for number in range(3):
        killed(runs, tmp_path / str(number), draw, count, times=2)
    check(count, "killed", capsys)


@pytest.mark.slow
def test_many_runs_killed_at_random_end_as_if_they_had_not_been(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, draw = Count(), random.Random(0)
    for number in range(60):
        killed(runs, tmp_path / str(number), draw, count, times=1 + number % 3)
    check(count, "toughen train, killed once to three times each", capsys)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of its own at ``folder``, and what gives it another size."""
    folder.mkdir()

    def resized(size: int, *options: str) -> None:
        settings = ",".join([*options, f"size={size}k"])
        subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(folder)], check=True, capture_output=True)

    try:
        resized(kilobytes)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        yield lambda size: resized(size, "remount")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_runs_that_fill_the_disk_go_on_when_there_is_room(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = sum(file.stat().st_size for file in (runs.recipe.parent / "whole").rglob("*")) // 1024
    count, draw = Count(), random.Random(0)
    for number in range(20):
        with small_disk(tmp_path / str(number), draw.randrange(8, needed)) as resized:
            run = tmp_path / str(number) / "run"
            count.tried += 1
            _, status = os.waitpid(runs.start(run), 0)
            said = run.with_suffix(".said").read_text() if run.with_suffix(".said").exists() else ""
            if "Traceback" in said:
                count.tracebacks.append(said[-2000:])
            count.refused += os.waitstatus_to_exitcode(status) == 2
            resized(20 * needed)
            code, text = (0, "") if RunFolder(run).finished else runs.finish(run)
            if code or outcome(RunFolder(run)) != runs.wanted:
                count.lost.append(f"{number}: status {code}, {text[-2000:]}, at first {said[-500:]}")
            else:
                count.survived += 1
    check(count, "toughen train on a disk that fills up", capsys)
    assert count.refused > 10


@pytest.mark.slow
def test_either_of_two_processes_killed_at_random_is_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(folder: Path, *options: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with (tmp_path / f"{folder.name}.said").open("w") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            words = [str(WORKER), str(folder), "ddp", "TRADES + CLAT"]
            return subprocess.Popen([*command, *words], stdout=said, stderr=said, env=environment)

    def weights(folder: Path) -> Any:
        return outcome(RunFolder(folder / "TRADES + CLAT"))

    assert started(tmp_path / "whole").wait() == 0
    count, draw = Count(), random.Random(0)
    for number in range(10):
        folder = tmp_path / str(number)
        count.tried += 1
        run = started(folder, "--max-restarts", "1")
        while run.poll() is None and not (folder / "TRADES + CLAT" / "config.yaml").exists():
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 3.0))
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=False)
        for pid in children.stdout.split()[draw.randrange(2) :][:1]:
            os.kill(int(pid), signal.SIGKILL)
        if run.wait() or weights(folder) != weights(tmp_path / "whole"):
            count.lost.append(f"{number}: {(tmp_path / f'{number}.said').read_text()[-3000:]}")
        else:
            count.survived += 1
    check(count, "two processes, one of them killed", capsys)
