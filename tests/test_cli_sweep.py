import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from small_runs import document, fingerprints, timeless, train
from toughen.cli import main
from toughen.run_folder import RunFolder


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def toughen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """The file of a sweep over two learning rates."""
    content = {"recipe": document(), "grid": {"train.lr": [0.05, 0.1]}, "resources": {"cpus": 1}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "grid.yaml"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


def test_a_dry_run_prints_the_runs_and_what_differs_and_writes_nothing(toughen, grid, without_ray):
    said = toughen("sweep", "grid.yaml", "--dry-run")

    assert said.status == 0
    assert "sweep grid: 2 runs" in said.out
    for cells in ("run seeds epochs train.lr", "lr-0.05 0 2 0.05", "lr-0.1 0 2 0.1"):
        assert re.search(r" +".join(re.escape(cell) for cell in cells.split()), said.out)
    assert sorted(file.name for file in grid.parent.iterdir()) == ["grid.yaml"]


def test_the_sweep_that_comes_along_is_eight_runs(toughen):
    assert "digits_methods: 8 runs" in toughen("sweep", "digits_methods", "--dry-run").out


def test_without_ray_one_line_says_what_to_install(toughen, grid, without_ray):
    said = toughen("sweep", "grid.yaml")

    assert said.status == 2
    assert 'pip install "toughen[ray]"' in said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workers", "0"], "--workers is 0"),
        (["--slurm", "a", "--dry-run"], "--slurm writes a script"),
        (["--slurm", "nowhere/a"], "no folder nowhere"),
        (["--address", "127.0.0.1:1", "--slurm", "a"], "--address"),
        (["--out", "lr=1", "--slurm", "a"], "choose another --out"),
        (["train.lr=2"], "settings of a recipe (key.path=value) are for `toughen train`"),
    ],
)
def test_words_that_do_not_go_together_are_refused_in_one_line(toughen, grid, words, expected):
    said = toughen("sweep", "grid.yaml", *words)

    assert said.status == 2
    assert said.err.count("\n") == 1
    assert expected in said.err


def test_a_sweep_and_a_run_refuse_the_folder_of_the_other(toughen, grid):
    run = train(Path("a-run"))

    taken = toughen("sweep", "grid.yaml", "--out", "a-run", "--slurm", "a.sbatch")
    assert taken.err == "toughen: sweep folder a-run is the folder of a run; choose another --out\n"
    assert not (run.path / "sweep.json").exists()

    toughen("sweep", "grid.yaml", "--out", "a-sweep", "--slurm", "a.sbatch")
    before = sorted(Path("a-sweep").iterdir())
    taken = toughen("train", "--out", "a-sweep")
    assert taken.err == "toughen: output folder a-sweep is the folder of a sweep; choose another --out\n"
    assert sorted(Path("a-sweep").iterdir()) == before


def test_a_folder_is_told_as_it_is_called(toughen, grid):
    said = toughen("sweep", "grid.yaml", "--out", "lr [bold] [/]", "--slurm", "a file.sbatch")

    assert said.err == "2 runs in lr [bold] [/]; submit them with: sbatch 'a file.sbatch'\n"


def test_a_file_whose_name_leads_out_of_the_folder_of_runs_needs_another_one(toughen, grid):
    grid.rename("...yaml")

    assert "its own name '..' names a folder" in toughen("sweep", "...yaml", "--dry-run").err


def test_a_cuda_run_without_gpus_is_refused(toughen, grid):
    grid.write_text(yaml.safe_dump({"recipe": document(train={"device": "cuda"})}))

    assert "resources.gpus is 0; set it to 1" in toughen("sweep", "grid.yaml").err


def test_a_run_is_that_of_train_to_the_bit_and_the_sweep_may_grow(toughen, grid, monkeypatch):
    pytest.importorskip("ray", reason='needs Ray: pip install "toughen[ray]"')
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = {"recipe": document(), "runs": {"fast": {"train.lr": 0.1}}, "seeds": [0]}
    grid.write_text(yaml.safe_dump(content))

    said = toughen("sweep", "grid.yaml", "--workers", 2)

    assert said.status == 0, said.err
    run, alone = RunFolder(Path("runs/grid/fast/seed-0")), train(Path("alone"), train={"lr": 0.1})
    assert fingerprints(run) == fingerprints(alone)
    assert run.config() == alone.config()
    assert timeless(run.evaluations("last")) == timeless(alone.evaluations("last"))
    assert run.provenance()["command"] == f"toughen train {run.path}/recipe.yaml --out {run.path}"
    assert "epoch   2" in (run.path / "output.log").read_text()
    assert "images" in said.out
    assert toughen("compare", "runs/grid").out == said.out
    written = {file: file.stat().st_mtime_ns for file in run.path.rglob("*.json")}

    again = toughen("sweep", "grid.yaml")
    assert (again.status, again.out) == (0, said.out)
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*.json")} == written

    grid.write_text(yaml.safe_dump({**content, "seeds": [0, 1]}))
    assert toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch").status == 0
    grown = toughen("compare", "runs/grid")
    assert grown.out == said.out
    assert "left out: fast/seed-1" in grown.err

    grid.write_text(yaml.safe_dump({**content, "runs": {"fast": {"train.lr": 0.2}}}))
    changed = toughen("sweep", "grid.yaml")
    assert changed.status == 2
    assert "fast/seed-0 was begun with other settings of train" in changed.err


def test_a_run_that_is_called_otherwise_since_the_file_was_changed_is_not_trained_twice(toughen, grid):
    content = {"recipe": document(), "grid": {"train.lr": [0.05]}}
    grid.write_text(yaml.safe_dump(content))
    assert toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch").status == 0
    old, new = Path("runs/grid/grid/seed-0"), Path("runs/grid/lr-0.05/seed-0")
    (old / "recipe.yaml").rename(old / "config.yaml")
    grid.write_text(yaml.safe_dump({**content, "grid": {"train.lr": [0.05, 0.1]}}))

    said = toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch")

    assert said.status == 2
    assert f"run {old} is called lr-0.05/seed-0 since the file of the sweep was changed; move its folder to {new}" in (
        said.err
    )
    new.parent.mkdir()
    old.rename(new)
    assert toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch").status == 0


def test_an_unfinished_sweep_has_nothing_to_compare(toughen, grid):
    assert toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch").status == 0

    said = toughen("compare", "runs/grid")

    assert said.status == 2
    assert "no finished run yet" in said.err


# -- SLURM --------------------------------------------------------------------------------------------


def slurm_task(script: Path, number: int) -> None:
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
    subprocess.run(["bash", str(script)], env=environment, cwd=script.parents[1], check=True)


def test_each_task_of_a_slurm_array_trains_its_run_or_goes_on_with_it(
    toughen, grid, tmp_path, monkeypatch, without_ray
):
    python = tmp_path / "it's a $(touch python)"  # says what it was called with
    python.write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$OMP_NUM_THREADS" "$@"; echo\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    out = "a 'b' $(touch out) `touch too`; touch three"

    assert toughen("sweep", "grid.yaml", "--slurm", "grid.sbatch", "--workers", 2, "--out", out).status == 0

    script = (tmp_path / "grid.sbatch").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert "#SBATCH --cpus-per-task=1\n" in script
    before = sorted(file.name for file in tmp_path.iterdir())
    run = Path(out) / "lr-0.1/seed-0"
    begin = f"{tmp_path}|1|-P|-m|toughen|train|{run}/recipe.yaml|--out|{run}|"
    resume = f"{tmp_path}|1|-P|-m|toughen|train|--resume|{run}|"
    for made in (None, "config.yaml", "finished.json"):
        if made:
            (run / made).touch()
        slurm_task(tmp_path / "grid.sbatch", 1)
    assert (run / "output.log").read_text().splitlines() == [begin, resume]
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert shlex.quote(out) in script
