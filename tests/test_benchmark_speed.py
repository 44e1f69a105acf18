"""What the user of benchmarks/speed.py did wrong is one line, and nothing that was measured is lost."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SETUP = {"model": "resnet18", "width": 8, "batch_size": 2, "steps": 1, "precision": "32-true", "compile": False}
SIZES = ["--width", "8", "--batch-size", "2", "--steps", "1"]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("speed")


def status(speed: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, words)])
    return speed.told(speed.main)


def test_a_file_that_cannot_be_used_is_named_in_one_line_before_the_work(speed, monkeypatch, tmp_path, capsys):
    (tmp_path / "cut.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    cases = {
        ("page", "nothing.json"): "holds no measurement",
        ("page", "cut.json"): "can't read",
        ("page", "list.json"): "not a file of this benchmark",
        ("steps", "folder/new.json"): "there is no folder",
        ("counts", "folder/new.json"): "there is no folder",
    }
    for (part, file), said in cases.items():
        assert status(speed, monkeypatch, part, "--json", tmp_path / file, *SIZES) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


@pytest.mark.parametrize("option", ["--width", "--batch-size", "--steps", "--rounds", "--threads"])
def test_a_size_below_one_is_refused(speed, monkeypatch, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        status(speed, monkeypatch, "steps", "--json", tmp_path / "new.json", option, "0")
    assert f"{option}: 0 is too small" in capsys.readouterr().err


def test_counts_refuses_what_it_would_not_heed(speed, monkeypatch, tmp_path, capsys):
    assert status(speed, monkeypatch, "counts", "--json", tmp_path / "new.json", "--model", "resnet50") == 2
    assert "counts takes" in capsys.readouterr().err
    (tmp_path / "old.json").write_text(json.dumps({"counts": {"setup": {**SETUP, "width": 4}, "rows": []}}))
    assert status(speed, monkeypatch, "counts", "--json", tmp_path / "old.json", *SIZES) == 2
    assert "another setup" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_a_cuda_graph_without_a_gpu_is_refused(speed, monkeypatch, tmp_path, capsys):
    assert status(speed, monkeypatch, "steps", "--json", tmp_path / "new.json", "--cuda-graph") == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_stop_is_told_in_one_line(speed, monkeypatch, tmp_path, capsys):
    def stopped(*_args: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "timed", stopped)
    assert status(speed, monkeypatch, "steps", "--json", tmp_path / "new.json") == 130
    assert capsys.readouterr().err == "stopped; the same command goes on where it was\n"
