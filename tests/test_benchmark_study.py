"""benchmarks/study.py trains and attacks in pieces, and its file of results holds what is finished."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from small_runs import clat, document
from toughen.run_folder import RunFolder


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.chdir(tmp_path)
    recipe = document(branch_epoch=1, branches={"pgd-at": {}, "clat": clat(lam=0.03)}, description="Whether it works.")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"recipe": recipe, "seeds": 2}, sort_keys=False))
    return importlib.import_module("study")


def status(study: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["study.py", *words])
    return study.told(study.main)


def test_all_networks_are_attacked_and_told_with_their_seeds(study, monkeypatch, tmp_path, capsys):
    words = ["small.yaml", "--json", "found.json", "--attacks", "pgd-3", "--samples", "10"]
    assert status(study, monkeypatch, *words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["seed"], row["branch"]) for row in found["rows"]] == [
        (seed, name) for seed in (0, 1) for name in ("start", "pgd-at", "clat")
    ]
    for row in found["rows"]:
        run = RunFolder.open(tmp_path / "runs" / "small" / "small" / f"seed-{row['seed']}")
        part = run if row["branch"] == "start" else run.branch(row["branch"])
        assert row["last"]["pgd-2"] == part.evaluations("last")["pgd-2"]["accuracy"]
        assert row["attacked"]["last"]["pgd-3"]["n"] == row["attacked"]["best"]["pgd-3"]["n"] == 10
    assert found["provenance"]["versions"]["torch"]
    said = capsys.readouterr()
    assert "next, 1 of 2: small/seed-0, 3 epochs. It decides: Whether it works." in said.err
    assert "| pgd-3 | last | best | last - pgd-at last | last - pgd-at best |" in said.out
    clean = {row["branch"]: [] for row in found["rows"]}
    for row in found["rows"]:
        clean[row["branch"]].append(100 * row["last"]["clean"])
    difference = sum(clean["clat"]) / 2 - sum(clean["pgd-at"]) / 2
    [line] = [line for line in said.out.split("| pgd-2 |")[0].splitlines() if line.startswith("| clat |")]
    assert f"| {sum(clean['clat']) / 2:.1f} (sd " in line
    assert f"| {difference:+.1f} [" in line or difference == 0


def test_a_stop_keeps_the_results_of_what_is_finished(study, monkeypatch, tmp_path, capsys):
    assert status(study, monkeypatch, "small.yaml") == 0
    monkeypatch.setattr(study, "attack", interrupted)
    assert status(study, monkeypatch, "small.yaml", "--json", "found.json", "--attacks", "pgd-3") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 6


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_mistake_is_one_line(study, monkeypatch, capsys):
    assert status(study, monkeypatch, "small.yaml", "--minutes", "0") == 2
    assert capsys.readouterr().err.strip() == "--minutes is 0; it must be above 0"
    assert status(study, monkeypatch, "gone.yaml") == 2
    assert capsys.readouterr().err.strip() == "no sweep file gone.yaml"
    assert status(study, monkeypatch, "small.yaml", "--attacks", "pgd") == 2
    assert "runs/small/small/seed-0 could not be attacked with pgd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10_tiny_study", "cifar10_resnet18_study", "cifar10_resnet18_bases"])
def test_the_studies_that_come_along_resolve(study, name):
    assert {run.seed for run in study.study(name, "somewhere").runs} >= {0, 1, 2}
    assert all(run.recipe.data.path == "somewhere" for run in study.study(name, "somewhere").runs)
