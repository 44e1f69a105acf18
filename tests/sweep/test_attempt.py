"""Attempts at runs that are not training, but small programs: what counts is how they end."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from toughen.sweep import attempt as attempts
from toughen.sweep.attempt import Attempt, Outcome, locked, make

# what a run is to its attempt: a file when it began, one when it is finished, an end when its pipe is closed
PROGRAM = """
import os, signal, sys, threading
def watch():
    os.read(0, 1)
    print("asked to stop", flush=True)
    os._exit(130)
threading.Thread(target=watch, daemon=True).start()
"""


def attempt(folder: Path, begin: str, resume: str = "raise SystemExit('resumed')") -> Attempt:
    return Attempt(
        begin=("-c", PROGRAM + begin),
        resume=("-c", PROGRAM + resume),
        begun=str(folder / "begun"),
        finished=str(folder / "finished"),
        output=str(folder / "output.log"),
        owner=str(folder / ".lock"),
        directory=str(folder),
        environment=(("OMP_NUM_THREADS", "3"),),
    )


def test_a_run_that_ends_well_is_finished_and_its_output_is_in_its_log(tmp_path: Path) -> None:
    program = "print(os.environ['OMP_NUM_THREADS'], os.getcwd()); open('finished', 'w')"

    assert make(attempt(tmp_path, program)) == Outcome("finished")
    assert (tmp_path / "output.log").read_text() == f"3 {tmp_path}\n"


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "finished").touch()

    assert make(attempt(tmp_path, "raise SystemExit(1)")) == Outcome("finished")
    assert (tmp_path / "output.log").read_text() == ""


def test_a_run_that_has_begun_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "begun").touch()

    assert make(attempt(tmp_path, "", resume="open('finished', 'w'); print('gone on')")) == Outcome("finished")
    assert "gone on" in (tmp_path / "output.log").read_text()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('toughen: no such rate'); sys.exit(2)", ("refused", "no such rate")),
        ("os.kill(os.getpid(), signal.SIGKILL)", ("died", "killed by SIGKILL")),
        ("print('out of luck'); sys.exit(3)", ("died", "exit status 3: out of luck")),
        ("", ("died", "exit status 0")),  # it left no sign of having finished
    ],
)
def test_how_a_run_ends_is_told_in_one_line(tmp_path: Path, program: str, expected: tuple[str, str]) -> None:
    (tmp_path / "output.log").write_text("toughen: of an earlier attempt\n")
    outcome = make(attempt(tmp_path, program))

    assert (outcome.how, outcome.message) == expected


def test_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    outcome = make(attempt(tmp_path / "elsewhere", ""))

    assert outcome.how == "refused"
    assert "elsewhere" in outcome.message


def test_asked_to_stop_it_asks_the_run_and_waits_for_it(tmp_path: Path) -> None:
    threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGINT)).start()

    assert make(attempt(tmp_path, "import time; time.sleep(60)")) == Outcome("stopped")
    assert (tmp_path / "output.log").read_text() == "asked to stop\n"


def test_a_run_whose_attempt_was_killed_stops_and_is_never_at_work_twice(tmp_path: Path) -> None:
    orphan = "open('at_work', 'x')\nimport time\nos.read = lambda *_: time.sleep(2)\ntime.sleep(60)"
    module, given = sys.modules[make.__module__].__file__, asdict(attempt(tmp_path, orphan))
    code = f"import runpy; a = runpy.run_path({module!r}); a['make'](a['Attempt'](**{given}))"
    starter = subprocess.Popen([sys.executable, "-c", code])  # as in Ray's processes, nothing of toughen is imported
    until((tmp_path / "at_work").exists)
    starter.kill()
    starter.wait()

    outcome = make(attempt(tmp_path, "print('second'); open('finished', 'w')"))

    assert outcome == Outcome("finished")
    assert (tmp_path / "output.log").read_text() == "asked to stop\nsecond\n"


def until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("owner", "named"), [("12 there\n", "process 12 on there"), (None, "a process that writes")])
def test_an_orphan_that_does_not_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str | None, named: str
) -> None:
    monkeypatch.setattr(attempts, "_PATIENCE", 0.1)
    if owner is not None:
        (tmp_path / ".lock").write_text(owner)
    with (tmp_path / "output.log").open("ab") as held:
        assert locked(held.fileno())
        outcome = make(attempt(tmp_path, "open('finished', 'w')"))

    assert outcome.how == "refused"
    assert named in outcome.message
    assert not (tmp_path / "finished").exists()
