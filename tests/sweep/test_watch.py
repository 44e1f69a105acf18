import io
from pathlib import Path

import pytest
from grids import GRID, write
from rich.console import Console

from toughen.run_folder import RunFolder
from toughen.sweep import SweepFolder, Watch, read_sweep, watch


def row(epoch: int) -> dict[str, object]:
    return {
        "epoch": epoch,
        "method": "PGD-AT",
        "losses": {"loss": 1.0},
        "lr": 0.1,
        "images_per_second": 500.0,
        "seconds": 2.0,
        "validation": {"clean": 0.9, "robust": 0.412, "n": 20},
    }


def test_a_terminal_shows_state_epoch_accuracies_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    monkeypatch.setattr(watch, "console", screen)
    now = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    runs = SweepFolder(tmp_path / "out").lay_out(read_sweep(str(write(tmp_path, grid=GRID))))

    with Watch(runs) as shown:
        runs[0].state = "running"
        shown.look()
        RunFolder(runs[0].folder.path).write_log([row(1)])
        now += 75
        shown.look()

    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "pgd-at/seed-0   running     1/2    90.0     41.2   0:01:15" in text
    assert "1 running, 1 waiting" in text


def test_a_pipe_gets_a_line_for_each_epoch_and_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = SweepFolder(tmp_path / "out").lay_out(read_sweep(str(write(tmp_path, grid=GRID))))

    with Watch(runs) as shown:
        runs[0].state = "running"
        shown.look()
        RunFolder(runs[0].folder.path).write_log([row(1)])
        runs[0].state, runs[0].message = "failed", "killed by SIGKILL"

    running, epoch, failed = capsys.readouterr().err.splitlines()
    assert running == "pgd-at/seed-0: running"
    assert epoch.startswith("pgd-at/seed-0: epoch   1")
    assert failed == "pgd-at/seed-0: failed: killed by SIGKILL"
    assert "waiting" in {one.state for one in runs}


def test_a_log_that_cannot_be_read_does_not_stop_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = SweepFolder(tmp_path / "out").lay_out(read_sweep(str(write(tmp_path, grid=GRID))))
    log = runs[0].folder.path / "log.jsonl"

    with Watch(runs) as shown:
        runs[0].state = "running"
        runs[0].folder.write_log([row(1)])
        shown.look()
        log.write_text("{")
        shown.look()
        runs[0].folder.write_log([row(1), row(2)])

    assert [line.split("epoch")[1].split()[0] for line in capsys.readouterr().err.splitlines() if "epoch" in line] == [
        "1",
        "2",
    ]
