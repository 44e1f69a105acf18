import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small_runs import clat, fingerprints, outcome, recipe, resume, timeless, train
from toughen import data
from toughen.cli import main
from toughen.config import load_recipe, resolve
from toughen.engine import Interrupted, Recipe, Trainer, checkpoint, create_model
from toughen.errors import InputError
from toughen.run_folder import RunFolder

# Two epochs of PGD-AT, then two branches of two epochs; one selects its layer anew before each of them.
CLEAN: dict[str, Any] = {
    "evaluate": {"attacks": ["clean"]}
}  # with an attack, most forwards would be those of the evaluation
BRANCHED: dict[str, Any] = {
    **CLEAN,
    "train": {"epochs": 4, "batch_size": 20, "checkpoint_steps": 1},
    "branch_epoch": 2,
    "branches": {"pgd-at": {}, "clat": clat(every=1, lam=0.03, select="random")},
}
ADAMW_CLAT: dict[str, Any] = {
    **CLEAN,
    "train": {"epochs": 3, "batch_size": 20, "optimizer": "adamw", "lr": 0.01, "checkpoint_steps": 1},
    **clat(start_epoch=1, every=1, select="random", norm_stats="follow", norm_affine="follow"),
}


class PowerCut(BaseException):
    """What stops a run from inside."""


def counted(wanted: Recipe, act: Callable[[int], None]) -> nn.Module:
    """The recipe's own network, which calls ``act`` with the number of each forward pass, branches included."""
    model = create_model(wanted.model, data.load(wanted.data), seed=wanted.train.seed)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        act(calls)

    model.register_forward_hook(count)
    return model


def num_forwards(folder: Path, **sections: Any) -> tuple[RunFolder, int]:
    """An uninterrupted run, and how many forward passes it takes."""
    last = 0

    def remember(number: int) -> None:
        nonlocal last
        last = number

    wanted = recipe(**sections)
    return Trainer(wanted, out=folder, model=counted(wanted, remember)).fit(), last


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, int]:
    return num_forwards(tmp_path_factory.mktemp("whole") / "run", **BRANCHED)


@pytest.fixture(scope="module")
def whole_adamw(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, int]:
    return num_forwards(tmp_path_factory.mktemp("whole") / "run", **ADAMW_CLAT)


@pytest.mark.parametrize("share", [0.07, 0.2, 0.35, 0.5, 0.62, 0.74, 0.85, 0.97])
def test_a_run_cut_at_any_forward_pass_ends_as_if_it_had_not_been(
    tmp_path: Path, whole: tuple[RunFolder, int], share: float
) -> None:
    run, total = whole
    wanted = recipe(**BRANCHED)

    def cut(number: int) -> None:
        if number == int(share * total):
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "run", model=counted(wanted, cut)).fit()

    assert not RunFolder(tmp_path / "run").finished
    assert outcome(resume(tmp_path / "run")) == outcome(run)


@pytest.mark.parametrize("share", [0.3, 0.55, 0.7, 0.9])
def test_adamw_and_a_new_selection_of_clat_survive_a_cut(
    tmp_path: Path, whole_adamw: tuple[RunFolder, int], share: float
) -> None:
    run, total = whole_adamw
    wanted = recipe(**ADAMW_CLAT)

    def cut(number: int) -> None:
        if number == int(share * total):
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "run", model=counted(wanted, cut)).fit()

    assert outcome(resume(tmp_path / "run")) == outcome(run)


def test_a_run_that_is_cut_at_every_epoch_still_ends_the_same(tmp_path: Path) -> None:
    sections = {**CLEAN, "train": {"epochs": 3}, **clat(start_epoch=1, every=1)}
    run, total = num_forwards(tmp_path / "whole", **sections)
    wanted = recipe(**sections)
    cuts = 0
    while not RunFolder(tmp_path / "run").finished:
        cuts += 1

        def cut(number: int, limit: int = total // 2) -> None:
            if number > limit:
                raise PowerCut

        again = RunFolder(tmp_path / "run").config_file.exists()
        trainer = Trainer(wanted, out=tmp_path / "run", model=counted(wanted, cut), resume=again)
        try:
            trainer.fit()
        except PowerCut:
            assert cuts < 20
    assert cuts > 2
    assert outcome(RunFolder(tmp_path / "run")) == outcome(run)


def test_sigterm_stops_after_the_step_under_way_and_resuming_ends_the_same(
    tmp_path: Path, whole: tuple[RunFolder, int]
) -> None:
    run, total = whole
    wanted = recipe(**BRANCHED)

    def ask(number: int) -> None:
        if number == total // 10:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(wanted, out=tmp_path / "run", model=counted(wanted, ask))

    with pytest.raises(Interrupted):
        trainer.fit()

    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.exists(tmp_path / "run" / "checkpoints" / "last")
    assert trainer.progress.step > 0
    assert outcome(resume(tmp_path / "run")) == outcome(run)


def test_sigusr1_writes_a_checkpoint_after_the_step_under_way_and_goes_on(tmp_path: Path) -> None:
    sections = {**CLEAN, "train": {"epochs": 2}}
    run, total = num_forwards(tmp_path / "whole", **sections)
    wanted, steps = recipe(**sections), []

    def ask(number: int) -> None:
        if number == total // 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer = Trainer(wanted, out=tmp_path / "run", model=counted(wanted, ask))
    save = trainer._state.save
    trainer._state.save = lambda name: (steps.append(trainer.progress.step), save(name))  # type: ignore[assignment]
    trainer.fit()

    [inside] = [step for step in steps if step]
    assert 0 < inside < 3
    assert outcome(RunFolder(tmp_path / "run")) == outcome(run)


def test_a_stop_while_the_method_chooses_after_the_last_epoch_is_no_less_heard(tmp_path: Path, monkeypatch) -> None:
    run = train(tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(tmp_path / "run")

    assert not RunFolder(tmp_path / "run").finished
    assert outcome(resume(tmp_path / "run")) == outcome(run)


def test_a_stop_between_two_epochs_resumes_without_extra_checkpoints(tmp_path: Path) -> None:
    sections = {"train": {"epochs": 3}}
    run = train(tmp_path / "whole", **sections)
    wanted = recipe(**sections)

    def cut(number: int) -> None:
        if len(RunFolder(tmp_path / "run").log()) == 1:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "run", model=counted(wanted, cut)).fit()

    assert [row["epoch"] for row in RunFolder(tmp_path / "run").log()] == [1]
    assert outcome(resume(tmp_path / "run")) == outcome(run)


def test_a_finished_run_is_returned_and_not_trained_again(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    files = {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}

    again = resume(run.path)

    assert again.path == run.path
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()} == files


def test_a_run_folder_that_was_moved_resumes(tmp_path: Path, whole: tuple[RunFolder, int]) -> None:
    run, total = whole
    wanted = recipe(**BRANCHED)

    def cut(number: int) -> None:
        if number == total // 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "here", model=counted(wanted, cut)).fit()
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "there" / "run")

    assert outcome(resume(tmp_path / "there" / "run")) == outcome(run)


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/last*"])
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew_over_its_log(tmp_path: Path, lost: str) -> None:
    run = train(tmp_path / "run", train={"epochs": 2})
    (run.path / "finished.json").unlink()
    for folder in run.path.glob(lost):
        shutil.rmtree(folder)
    log = (run.path / "log.jsonl").read_bytes()

    with pytest.raises(InputError, match=r"run .*run has lost its checkpoints: .*last is not there; copy it back"):
        resume(run.path)
    assert (run.path / "log.jsonl").read_bytes() == log


def test_a_run_killed_between_its_first_log_and_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run = train(tmp_path / "run", train={"epochs": 1})
    before = outcome(run)
    (run.path / "finished.json").unlink()
    shutil.rmtree(run.checkpoints / "last")

    assert outcome(resume(run.path)) == before


def test_a_branch_without_a_checkpoint_does_not_start_from_nothing(tmp_path: Path) -> None:
    run = train(tmp_path / "run", train={"epochs": 2}, branch_epoch=1, branches={"pgd-at": {}})
    branch = run.branch("pgd-at")
    (branch.path / "finished.json").unlink()
    shutil.rmtree(branch.path / "checkpoints" / "last")

    with pytest.raises(InputError, match=r"branch.*resume its run"):
        resume(branch.path)


# -- real processes -------------------------------------------------------------------------------

KILLED = (
    "digits",
    "model.width=4",
    "data.train_samples=240",
    "data.validation=40",
    "data.test_samples=40",
    "attack.steps=3",
    "train.epochs=4",
    "train.batch_size=20",
    "train.checkpoint_steps=3",
    "branch_epoch=2",
    "branches.clat.method.1.every=1",
)


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "toughen", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_checkpoint(folder: Path) -> None:
    end = time.monotonic() + 60
    while not checkpoint.exists(folder / "checkpoints" / "last"):
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.005)


def wait_for_epoch(process: "subprocess.Popen[str]") -> None:
    """Wait until a process tells of an epoch, or ends."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            return


def timed_run(folder: Path) -> tuple[RunFolder, float]:
    """The uninterrupted run, and how many seconds it took."""
    started = time.perf_counter()
    run = Trainer(load_recipe(KILLED[0], KILLED[1:]), out=folder).fit()
    return run, time.perf_counter() - started


def killed_and_resumed(folder: Path, moments: list[float]) -> RunFolder:
    """Kill the run at each moment (seconds after its first checkpoint), resuming in between; then let it end."""
    process = start(*KILLED, "--out", str(folder))
    wait_for_checkpoint(folder)
    for moment in moments:
        time.sleep(moment)
        process.kill()
        process.communicate()
        if RunFolder(folder).finished:
            return RunFolder(folder)
        process = start("--resume", str(folder))
        if moment is not moments[-1]:
            wait_for_epoch(process)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return RunFolder.open(folder)


def test_sigkill_at_a_random_moment_and_a_resume_give_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    run, seconds = timed_run(tmp_path / "whole")
    moment = 0.8 * seconds * random.random()  # another one each time: any of them must do

    again = killed_and_resumed(tmp_path / "run", [moment])

    assert outcome(again) == outcome(run), f"killed {moment} s after the first checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(0.02, 0.3, 0.1), (0.0, 0.5, 0.2), (0.4, 0.0, 0.02)], ids=str)
def test_sigkill_at_three_moments_of_one_run_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, shares: tuple[float, ...]
) -> None:
    run, seconds = timed_run(tmp_path / "whole")

    again = killed_and_resumed(tmp_path / "run", [share * seconds for share in shares])

    assert fingerprints(again) == fingerprints(run)


def test_ctrl_c_exits_130_names_the_resume_command_and_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(*KILLED, "train.epochs=500", "branch_epoch=400", "--out", str(folder))
    wait_for_checkpoint(folder)

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert re.search(rf"toughen train --resume {re.escape(str(folder))}$", stderr.splitlines()[-1])
    wanted = resolve(RunFolder.open(folder).config())
    model = create_model(wanted.model, data.load(wanted.data))
    state = checkpoint.load(folder / "checkpoints" / "last", model)
    assert state["epoch"] * 12 + state["step"] > 0


def test_a_look_at_an_unfinished_run_does_not_become_its_result(tmp_path):
    wanted = recipe(train={"epochs": 3})
    reference = Trainer(wanted, out=tmp_path / "reference").fit()

    def stop(number: int) -> None:
        if len(RunFolder(tmp_path / "run").log()) == 1:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "run", model=counted(wanted, stop)).fit()
    assert main(["evaluate", str(tmp_path / "run"), "--attacks", "clean,pgd-2"]) == 0
    assert RunFolder(tmp_path / "run").evaluations("last")["clean"]["epoch"] == 1

    run = resume(tmp_path / "run")
    assert timeless(run.evaluations("last")) == timeless(reference.evaluations("last"))


def test_what_dropout_draws_depends_on_the_step_alone(tmp_path):
    wanted = recipe(train={"epochs": 2, "checkpoint_steps": 1})

    def network() -> nn.Module:
        own = create_model(wanted.model, data.load(wanted.data), seed=0)
        return nn.Sequential(own, nn.Dropout(0.5))

    torch.manual_seed(1)
    whole = Trainer(wanted, out=tmp_path / "whole", model=network()).fit()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    stopped = Trainer(wanted, out=tmp_path / "stopped", model=network())
    stopped._wishes._heard.append(2)  # as a signal would, before the first step
    with pytest.raises(Interrupted):
        stopped.fit()
    again = Trainer(wanted, out=tmp_path / "stopped", model=network(), resume=True).fit()

    assert fingerprints(whole) == fingerprints(again)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_branch_of_a_clat_run_goes_on_with_its_selections(tmp_path):
    plan = {"train": {"epochs": 6}, **clat(every=2, select="random")}
    alone = train(tmp_path / "alone", **plan)
    run = train(tmp_path / "run", **plan, branch_epoch=3, branches={"on": {}})

    selected = [row["selected"] for member in (run, run.branch("on")) for row in member.log()]
    assert selected == [row["selected"] for row in alone.log()]
    assert list(run.reports()) + list(run.branch("on").reports()) == [0, 2, 4]
