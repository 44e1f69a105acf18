"""What a person sees of a run: a bar in a terminal, lines in a pipe."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from small_runs import recipe, train
from toughen import Trainer
from toughen.engine import Interrupted, progress

WIDE = {"width": 200, "height": 30}


def screen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    seen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=seen, force_terminal=terminal, **WIDE))
    return seen


def test_a_terminal_shows_time_left_speed_and_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = screen(monkeypatch, terminal=True)
    run = train(tmp_path / "run", train={"epochs": 2})
    last = [re.sub(r"\x1b\[[\d;?]*\w", "", line) for line in seen.getvalue().splitlines() if "6/6" in line][-1]
    measured = run.log()[-1]["validation"]
    assert re.search(r"run: PGD-AT .* 6/6 .*left \d+:\d+:\d+ [1-9]\d* images/s", last)
    assert f"clean {100 * measured['clean']:.1f} robust {100 * measured['robust']:.1f}" in last


def test_a_pipe_gets_a_line_for_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = screen(monkeypatch, terminal=False)
    train(tmp_path / "run", train={"epochs": 2})
    lines = seen.getvalue().splitlines()
    assert all(re.search(rf"run: epoch +{epoch}  PGD-AT .* \d+ images/s", lines[epoch - 1]) for epoch in (1, 2))
    assert len(lines) == 2
    assert "\x1b" not in seen.getvalue()


def test_steps_of_before_a_resume_do_not_count_as_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("toughen.engine.trainer.evaluate_checkpoints", cut)
        with pytest.raises(Interrupted):
            train(tmp_path / "run")
    seen = screen(monkeypatch, terminal=True)
    Trainer(recipe(), out=tmp_path / "run", resume=True).fit()
    assert "6/6" in seen.getvalue()
    assert "images/s" not in seen.getvalue()
