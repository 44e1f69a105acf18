"""Runs of a sweep one after another, and runs that get further branches."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from small_runs import clat, document, fingerprints, log, train
from toughen.errors import InputError
from toughen.run_folder import RunFolder
from toughen.sweep import SweepFolder, finished_runs, read_sweep, train_serially

BRANCHES = {"pgd-at": {}, "clat": clat(lam=0.03)}


def sweep(tmp_path: Path, **content: Any) -> Any:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    return read_sweep(str(tmp_path / "grid.yaml"))


def test_runs_are_what_toughen_train_would_make(tmp_path: Path) -> None:
    said: list[str] = []
    runs = train_serially(
        sweep(tmp_path, recipe=document(), grid={"train.lr": [0.05, 0.1]}),
        SweepFolder(tmp_path / "runs"),
        say=lambda _, text: said.append(text),
    )
    assert [one.state for one in runs] == ["finished", "finished"]
    assert said[0] == "next, 1 of 2: lr-0.05/seed-0, 2 epochs"
    assert said[1].startswith("next, 2 of 2: lr-0.1/seed-0, 2 epochs, about 0.0 minutes")
    alone = train(tmp_path / "alone", train={"lr": 0.1})
    assert fingerprints(runs[1].folder) == fingerprints(alone)


def test_a_run_that_is_refused_does_not_stop_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    grid = {"train.batch_size": [5000, 20]}
    runs = train_serially(
        sweep(tmp_path, recipe=document(), grid=grid),
        SweepFolder(tmp_path / "runs"),
        say=lambda _, text: said.append(text),
    )
    assert [one.state for one in runs] == ["failed", "finished"]
    assert "5000" in runs[0].message
    assert any("can't be trained" in line for line in said)


def test_a_branch_that_is_added_later_is_the_branch_that_was_there_from_the_beginning(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "runs")
    for names in (["pgd-at"], ["clat"], ["clat", "pgd-at"]):
        branches = {name: BRANCHES[name] for name in names}
        [one] = train_serially(
            sweep(tmp_path, recipe=document(branch_epoch=1, branches=branches)), folder, say=lambda *_: None
        )
        assert one.state == "finished"
    at_once = train(tmp_path / "at-once", branch_epoch=1, branches=BRANCHES)
    assert [branch.path.name for branch in one.folder.branches()] == ["clat", "pgd-at"]
    for branch in at_once.branches():
        assert fingerprints(one.folder.branch(branch.path.name)) == fingerprints(branch)
        assert log(one.folder.branch(branch.path.name)) == log(branch)
    assert log(one.folder) == log(at_once)


def test_a_run_keeps_the_branches_that_a_file_does_not_name(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "runs")
    for branches in (BRANCHES, {"pgd-at": {}}):
        train_serially(sweep(tmp_path, recipe=document(branch_epoch=1, branches=branches)), folder, say=lambda *_: None)
    run = RunFolder.open(folder.path / "grid" / "seed-0")
    assert {branch.path.name for branch in run.branches()} == set(BRANCHES)
    assert run.finished


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"branches": {"pgd-at": {}, "clat": clat(lam=0.5)}},
            r"other settings of branches\.clat than the sweep has now",
        ),
        ({"branch_epoch": 2, "train": {"epochs": 3}}, r"other settings of (branch_epoch|train)"),
        ({"threat": {"eps": 0.1}}, "other settings of threat"),
    ],
)
def test_a_run_that_differs_in_more_than_further_branches_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    folder = SweepFolder(tmp_path / "runs")
    begun = {"branch_epoch": 1, "branches": BRANCHES}
    train_serially(sweep(tmp_path, recipe=document(**begun)), folder, say=lambda *_: None)
    with pytest.raises(InputError, match=message):
        folder.lay_out(sweep(tmp_path, recipe=document(**{**begun, **changed})))


def test_a_sweep_that_is_refused_for_one_run_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "runs")
    begun, slow = document(branch_epoch=1, branches={"pgd-at": {}}), {"train.lr": 0.2}
    train_serially(sweep(tmp_path, recipe=begun, runs={"a": {}, "b": slow}), folder, say=lambda *_: None)
    before = RunFolder.open(folder.path / "a" / "seed-0").config()
    wider = document(branch_epoch=1, branches=BRANCHES)
    with pytest.raises(InputError, match="other settings of threat"):
        folder.lay_out(sweep(tmp_path, recipe=wider, runs={"a": {}, "b": {**slow, "threat": {"eps": 0.1}}}))
    run = RunFolder.open(folder.path / "a" / "seed-0")
    assert run.finished
    assert run.config() == before


def test_a_folder_remembers_the_runs_of_earlier_sweeps(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "runs")
    for name, lr in (("a", 0.05), ("b", 0.1)):
        changes = {name: {"train.lr": lr}}
        train_serially(sweep(tmp_path, recipe=document(), runs=changes), folder, say=lambda *_: None)
    found = finished_runs(folder.path)
    assert found is not None
    assert {run.path.parent.name for run in found[0]} == {"a", "b"}
    assert found[1] == []
