"""benchmarks/study.py trains and attacks in pieces, and its file of results holds what is finished."""

import importlib
import json
import shutil
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
    assert found["command"] == "python benchmarks/study.py small.yaml --json found.json --attacks pgd-3 --samples 10"
    said = capsys.readouterr()
    assert "next, 1 of 2: small/seed-0, 3 epochs. It decides: Whether it works." in said.err
    assert "| pgd-3 | seeds | last | best | last - pgd-at last | last - pgd-at best |" in said.out
    clean = {row["branch"]: [] for row in found["rows"]}
    for row in found["rows"]:
        clean[row["branch"]].append(100 * row["last"]["clean"])
    difference = sum(clean["clat"]) / 2 - sum(clean["pgd-at"]) / 2
    [line] = [line for line in said.out.split("| pgd-2 |")[0].splitlines() if line.startswith("| clat |")]
    assert f"| clat | 2 | {sum(clean['clat']) / 2:.1f} (sd " in line
    assert f"| {difference:+.1f} [" in line or difference == 0


def test_a_stop_keeps_what_was_attacked_and_trained_before(study, monkeypatch, tmp_path, capsys):
    words = ["small.yaml", "--json", "found.json", "--attacks", "pgd-3", "--samples", "10"]
    assert status(study, monkeypatch, *words) == 0
    before = json.loads((tmp_path / "found.json").read_text())["rows"]
    recipe = yaml.safe_load((tmp_path / "small.yaml").read_text())
    recipe["recipe"]["branches"]["random"] = clat(lam=0.03, select="random")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with monkeypatch.context() as patched:
        patched.setattr(study, "train_serially", interrupted)
        assert status(study, patched, "small.yaml", "--json", "found.json") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == before
    assert all(row["attacked"]["last"]["pgd-3"]["n"] == 10 for row in before)
    # a run that got a further branch is not finished, its other networks are
    assert status(study, monkeypatch, "small.yaml", "--json", "found.json", "--attacks", "pgd-4", "--samples", "5") == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["branch"] for row in rows] == 2 * ["start", "pgd-at", "clat", "random"]
    assert set(rows[0]["attacked"]["best"]) == {"pgd-3", "pgd-4"}
    assert set(rows[3]["attacked"]["best"]) == {"pgd-4"}


def test_networks_of_a_run_that_is_not_finished_are_in_the_file(study, monkeypatch, tmp_path):
    assert status(study, monkeypatch, "small.yaml") == 0
    run = RunFolder.open(tmp_path / "runs" / "small" / "small" / "seed-1")
    shutil.rmtree(run.branch("clat").path)
    run.finished_file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(study, "train_serially", interrupted)
        assert status(study, patched, "small.yaml", "--json", "found.json") == 130
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["seed"], row["branch"]) for row in rows] == [
        (0, "start"), (0, "pgd-at"), (0, "clat"), (1, "start"), (1, "pgd-at")
    ]  # fmt: skip


def test_runs_with_the_same_branches_are_told_apart(study, monkeypatch, tmp_path, capsys):
    recipe = yaml.safe_load((tmp_path / "small.yaml").read_text())["recipe"]
    runs = {"slow": {"train": {"lr": 0.001}}, "fast": {"train": {"lr": 0.1}}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"recipe": recipe, "runs": runs, "seeds": 1}, sort_keys=False))
    assert status(study, monkeypatch, "two.yaml", "--json", "found.json") == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["run"], row["branch"]) for row in rows] == [
        (run, branch) for run in runs for branch in ("start", "pgd-at", "clat")
    ]
    told = capsys.readouterr().out
    for run in runs:
        folder = RunFolder.open(tmp_path / "runs" / "two" / run / "seed-0")
        clean = 100 * folder.branch("clat").evaluations("last")["clean"]["accuracy"]
        section = told.partition(f"## {run}\n")[2].partition("\n## ")[0].partition("| pgd-2 |")[0]
        assert f"| clat | 1 | {clean:.1f} |" in section


def test_a_sweep_without_branches_is_told(study, monkeypatch, tmp_path, capsys):
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"recipe": document(), "seeds": 1}, sort_keys=False))
    assert status(study, monkeypatch, "plain.yaml") == 0
    assert "| start | 1 |" in capsys.readouterr().out


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_mistake_is_one_line(study, monkeypatch, capsys):
    assert status(study, monkeypatch, "small.yaml", "--minutes", "0") == 2
    assert capsys.readouterr().err.strip() == "--minutes is 0; it must be above 0"
    assert status(study, monkeypatch, "gone.yaml") == 2
    assert capsys.readouterr().err.strip() == "no sweep file gone.yaml"
    for flag in ("--only", "--against"):
        assert status(study, monkeypatch, "small.yaml", flag, "cla") == 2
        assert f"unknown branch in {flag}: 'cla'; did you mean 'clat'" in capsys.readouterr().err
    assert status(study, monkeypatch, "small.yaml", "--attacks", "pgd") == 2
    assert "runs/small/small/seed-0 could not be attacked with pgd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_tiny_study",
        "cifar10_resnet18_study",
        "cifar10_tiny_bases",
        "cifar10_resnet18_bases",
        "cifar10_tiny_densenet121",
        "cifar10_densenet121_selection",
    ],
)
def test_the_studies_that_come_along_resolve(study, name):
    assert {run.seed for run in study.study(name, "somewhere").runs} >= {0, 1}
    assert all(run.recipe.data.path == "somewhere" for run in study.study(name, "somewhere").runs)
