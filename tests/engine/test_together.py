"""Several processes that train together: the same as one, whatever happens to one of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from together import BRANCHED, CASES, OWN_NORM, PGD_AT, SHARDED, Precise, ended, main, small_cnn
from torch import Tensor

from small_runs import clat, recipe, resume
from toughen import Trainer, processes
from toughen.engine import Interrupted
from toughen.engine.run_state import RunState
from toughen.errors import InputError, Notice
from toughen.run_folder import RunFolder

WORKER = Path(__file__).with_name("together.py")


def torchrun(
    *arguments: object, options: tuple[str, ...] = (), fails: bool = False
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=500, env=environment
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def told(run: Path) -> list[tuple[Any, ...]]:
    """What the log of a run says of selection and accuracy."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["selected"], row.get("validation")) for row in rows]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the runs of one process and of two."""
    folder = tmp_path_factory.mktemp("ddp")
    torchrun(WORKER, folder / "two", "ddp", *CASES)
    main(folder / "one", CASES, list(CASES))
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, where the two hold a half of the weights each."""
    folder = tmp_path_factory.mktemp("fsdp")
    torchrun(WORKER, folder / "two", "fsdp", *SHARDED)
    main(folder / "one", SHARDED, list(SHARDED))
    return folder / "one", folder / "two"


def check_alike(one: Path, two: Path) -> None:
    [alone], (first, second) = ended(one).values(), ended(two).values()
    assert all(torch.equal(first[key], second[key]) for key in first), "the processes drifted apart"
    assert largest_difference(alone, first) < 1e-9
    assert told(one) == told(two)
    if "CLAT" in one.name:
        assert len({str(selected) for _, selected, _ in told(one)[1:]}) > 1, "nothing was selected anew"
    assert RunFolder(two).provenance()["processes"] == 2
    assert RunFolder(two).finished


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_over_four_selections(ddp: tuple[Path, Path], name: str) -> None:
    check_alike(ddp[0] / name, ddp[1] / name)


def test_the_statistics_of_a_norm_that_is_not_synchronised_stay_the_same_in_all_processes(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "ddp", *OWN_NORM)
    for name in OWN_NORM:
        first, second = ended(tmp_path / name).values()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_branch_may_normalise_by_the_images_of_a_process_where_its_run_does_not(tmp_path: Path) -> None:
    [name] = BRANCHED
    torchrun(WORKER, tmp_path / "two", "ddp", name)
    with pytest.warns(Notice, match="train.batch_norm=local changes nothing in one process"):
        main(tmp_path / "one", BRANCHED, [name])
    folders = [[tmp_path / number / name, tmp_path / number / name / "branches" / "local"] for number in ("one", "two")]
    (run, branch), (run_of_two, branch_of_two) = (
        [load_file(folder / "checkpoints" / "last" / "weights.safetensors") for folder in both] for both in folders
    )
    assert largest_difference(run, run_of_two) < 1e-6
    assert largest_difference(branch, branch_of_two) > 1e-4


def test_perturbations_that_one_process_stored_are_taken_up_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a single batch, so that one of the two has none."""
    save = RunState.save

    def saved_and_stopped(self: RunState, name: str) -> None:
        save(self, name)
        raise Interrupted

    plan = {"epochs": 3, "batch_size": 60, "checkpoint_steps": 1}
    wanted = recipe(method=[PGD_AT, {"name": "carry-over"}], train=plan)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", saved_and_stopped)
        trainer = Trainer(wanted, out=tmp_path / "run")
        with pytest.raises(Interrupted):
            trainer.fit()
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    torchrun("-m", "toughen", "train", "--resume", tmp_path / "two")
    resume(tmp_path / "run")
    one, two = (load_file(tmp_path / run / "checkpoints" / "last" / "weights.safetensors") for run in ("run", "two"))
    assert largest_difference(one, two) < 3e-4  # 7e-3 where nothing is carried over; float32, so a sign may turn


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_that_hold_half_of_the_weights_each_train_as_one(fsdp: tuple[Path, Path], name: str) -> None:
    check_alike(fsdp[0] / name, fsdp[1] / name)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("ddp", "PGD-AT + CLAT + AWP"), pytest.param("fsdp", "ViT, PGD-AT + CLAT", marks=pytest.mark.slow)],
)
def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(
    tmp_path: Path, request: pytest.FixtureRequest, strategy: str, name: str
) -> None:
    undisturbed: Path = request.getfixturevalue(strategy)[1] / name
    torchrun(WORKER, tmp_path, strategy, "--killed", name, options=("--max-restarts", "1"))
    first, second = ended(tmp_path / name).values()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert largest_difference(ended(undisturbed)["rank0"], first) == 0.0
    assert told(tmp_path / name) == told(undisturbed)


def test_processes_with_unlike_recipes_are_told_what_differs_before_anything_is_written(tmp_path: Path) -> None:
    done = torchrun(WORKER, tmp_path, "ddp", "--unlike", "PGD-AT", fails=True)
    assert "the processes differ in recipe.train.lr (0.01 and 0.02); start all of them with the same" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_trains_in_several_processes_and_speaks_once(tmp_path: Path) -> None:
    small = ["model.width=2", "data.train_samples=60", "data.validation=20", "data.test_samples=40", "attack.steps=2"]
    plan = ["train.epochs=2", "train.batch_size=20", "train.device=cpu", "branches=null", "branch_epoch=null"]
    done = torchrun("-m", "toughen", "train", *small, *plan, "--out", tmp_path / "run")
    assert done.stdout.count("accuracy on 40 test images") == 1
    assert done.stderr.count("epoch   2") == 1
    assert RunFolder(tmp_path / "run").finished


def test_statistics_that_stand_still_are_not_touched_by_their_mean_over_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_three(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_((tensor + tensor + tensor) / 3)  # a seventh of all numbers comes back as another one

    trainer = Trainer(recipe(**clat()), out=tmp_path / "run")
    for buffer in trainer.model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape))
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    monkeypatch.setattr(processes, "average", mean_of_three)
    trainer.fit()
    still = [torch.equal(buffer, before[name]) for name, buffer in trainer.model.named_buffers()]
    assert all(still)


def test_a_batch_in_parts_trains_as_one_in_one_piece(tmp_path: Path) -> None:
    method = [{"name": "trades"}, {"name": "clat", "k": 2, "every": 1}]  # batch norm moves nowhere
    whole, parts = (
        Trainer(
            recipe(method=method, train={"epochs": 3, "accumulate": n}),
            out=tmp_path / str(n),
            model=Precise(small_cnn()),
        ).fit()
        for n in (1, 4)
    )
    one, other = (load_file(run.checkpoints / "last" / "weights.safetensors") for run in (whole, parts))
    assert largest_difference(one, other) < 1e-9
    assert told(whole.path) == told(parts.path)


def test_what_does_not_divide_or_goes_on_from_use_to_use_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size=20 does not divide into 1 process times train\.accumulate=3"):
        Trainer(recipe(train={"accumulate": 3}), out="nowhere")
    with pytest.raises(InputError, match=r"Free-AT does not go with train\.accumulate=2"):
        recipe(method=[{"name": "free-at"}], train={"accumulate": 2})


def test_methods_that_can_not_train_dealt_out_weights_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"AWP does not go with train\.strategy=fsdp.*use ddp, or methods that can: carry-o"
    ):
        recipe(method=[{"name": "pgd-at"}, {"name": "awp"}], train={"strategy": "fsdp"})
