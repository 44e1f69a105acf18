"""Sweeps on Ray whose runs are small programs in place of training."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from grids import write

from toughen.durable import unsealed
from toughen.engine import Interrupted
from toughen.errors import InputError
from toughen.sweep import Address, Sweep, SweepFolder, read_sweep, schedule, train_all
from toughen.sweep.attempt import Outcome

pytestmark = pytest.mark.usefixtures("local_ray")

# what `toughen train RECIPE --out RUN` and `toughen train --resume RUN` do, and what may go wrong with them
PROGRAM = """
import os, shutil, signal, sys, time
from pathlib import Path
run = Path(sys.argv[-1])
with (run / "starts").open("a") as starts:
    starts.write(sys.argv[2] + "\\n")
shutil.copy(run / "recipe.yaml", run / "config.yaml")
resumed = "--resume" in sys.argv
if "dies once" in os.listdir(run) and not resumed or "dies" in os.listdir(run):
    os.kill(os.getpid(), signal.SIGKILL)
if "mistake" in os.listdir(run):
    print("toughen: train.lr is too large")
    sys.exit(2)
if "waits" in os.listdir(run) and not resumed:
    print("waits", flush=True)
    os.read(0, 1)
    sys.exit(130)
(run / "finished.json").touch()
"""


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_TOUGHEN", ("-c", PROGRAM))


def starts(folder: SweepFolder, run: str) -> list[str]:
    file = folder.path / run / "starts"
    return file.read_text().splitlines() if file.exists() else []


def laid_out(tmp_path: Path, *behaviour: str, retries: int = 1) -> tuple[Sweep, SweepFolder]:
    """A sweep over as many seeds as there are kinds of behaviour."""
    sweep = read_sweep(str(write(tmp_path, name="s", seeds=len(behaviour), retries=retries)))
    folder = SweepFolder(tmp_path / "out")
    for seed, how in enumerate(behaviour):
        (folder.path / f"s/seed-{seed}").mkdir(parents=True)
        (folder.path / f"s/seed-{seed}" / how).touch()
    return sweep, folder


def stop_when_at_work(folder: SweepFolder) -> None:
    log = folder.path / "s/seed-0/output.log"

    def stop() -> None:
        while not (log.exists() and "waits" in log.read_text()):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()


def states(folder: SweepFolder) -> list[str]:
    file = folder.path / "sweep.json"
    return [run["state"] for run in unsealed(file.read_text(), file)["runs"]]


def test_who_dies_is_retried_who_is_mistaken_is_not_and_nothing_finished_is_repeated(tmp_path: Path) -> None:
    sweep, folder = laid_out(tmp_path, "well", "dies once", "mistake", "dies", retries=2)

    runs = train_all(sweep, folder, Address())

    assert [one.state for one in runs] == states(folder) == ["finished", "finished", "failed", "failed"]
    assert [one.message for one in runs[2:]] == ["train.lr is too large", "killed by SIGKILL"]
    assert [len(starts(folder, run.name)) for run in sweep.runs] == [1, 2, 1, 3]
    assert starts(folder, "s/seed-1")[1] == "--resume"

    train_all(sweep, folder, Address())

    assert [len(starts(folder, run.name)) for run in sweep.runs] == [1, 2, 2, 6]


def test_no_more_runs_than_workers_are_at_work_and_a_stop_reaches_them(tmp_path: Path) -> None:
    sweep, folder = laid_out(tmp_path, "waits", "waits")
    stop_when_at_work(folder)
    with pytest.raises(Interrupted, match="same command"):
        train_all(sweep, folder, Address(workers=1))

    assert states(folder) == ["stopped", "stopped"]
    assert [len(starts(folder, run.name)) for run in sweep.runs] == [1, 0]

    shutil.rmtree(folder.path / "s/seed-1")
    runs = train_all(sweep, folder, Address())

    assert [one.state for one in runs] == ["finished", "finished"]
    assert starts(folder, "s/seed-0")[1] == "--resume"


def test_a_run_that_no_machine_has_room_for_is_refused_before_the_first(tmp_path: Path) -> None:
    sweep = read_sweep(str(write(tmp_path, resources={"cpus": 64})))

    with pytest.raises(InputError, match=r"cpus 64.*this machine has cpus 2"):
        train_all(sweep, SweepFolder(tmp_path / "out"), Address())


def test_runs_in_a_pipe_are_told_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, folder = laid_out(tmp_path, "dies once")
    train_all(sweep, folder, Address())

    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "s/seed-0: finished"
    assert "s/seed-0: killed by SIGKILL; it goes on from its checkpoint (retry 1 of 1)" in said


def test_a_run_that_dies_while_the_sweep_stops_is_not_said_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule._Schedule, "_outcome", lambda *_: Outcome("died", "its machine is gone"))
    sweep, folder = laid_out(tmp_path, "waits")
    stop_when_at_work(folder)
    with pytest.raises(Interrupted):
        train_all(sweep, folder, Address())

    assert states(folder) == ["failed"]
    said = capsys.readouterr().err
    assert "s/seed-0: failed: its machine is gone" in said
    assert "goes on" not in said


def test_another_cluster_than_that_of_the_program_is_refused(tmp_path: Path) -> None:
    sweep, folder = laid_out(tmp_path, "finishes")

    with pytest.raises(InputError, match=r"Ray runs in this program already.*can't be that of elsewhere:6379; leave"):
        train_all(sweep, folder, Address(cluster="elsewhere:6379"))
