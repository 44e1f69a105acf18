"""A mixture in a recipe: its two networks come from runs, and are needed no more once its own run has begun."""

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from small_runs import document, outcome, resume
from toughen.cli import main
from toughen.config import network_of, resolve
from toughen.engine import Trainer
from toughen.errors import InputError, Notice
from toughen.models import read_weights
from toughen.run_folder import RunFolder

METHOD = [{"name": "adaptive-smoothing"}]


class PowerCut(BaseException):
    """What stops a run from inside."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, method in (("g", "clean"), ("h", "pgd-at")):
        changes = {"method": [{"name": method}], "train": {"epochs": 1}}
        Trainer(resolve(document(**changes)), out=folder / name, show_progress=False).fit()
    return folder


def mixture(bases: Path, method=METHOD, **model):
    names = {"name": "adaptive_smoothing", "accurate": str(bases / "g"), "robust": str(bases / "h")}
    return resolve({**document(method=method, train={"checkpoint_steps": 1}), "model": {**names, **model}})


def test_a_run_of_a_mixture_holds_all_that_is_needed_to_evaluate_and_resume_it(bases, tmp_path, capsys):
    moved = Path(shutil.copytree(bases, tmp_path / "bases"))
    wanted = mixture(moved)
    whole = Trainer(wanted, out=tmp_path / "whole", show_progress=False).fit()
    step, steps = Trainer._step, 0

    def cut(self, *batch):
        nonlocal steps
        steps += 1
        if steps == 5:
            raise PowerCut
        step(self, *batch)

    with patch.object(Trainer, "_step", cut), pytest.raises(PowerCut):
        Trainer(wanted, out=tmp_path / "cut", show_progress=False).fit()
    shutil.rmtree(moved)

    assert outcome(resume(tmp_path / "cut")) == outcome(whole)
    assert main(["evaluate", str(whole.path), "--attacks", "clean", "--device", "cpu"]) == 0
    assert "clean" in capsys.readouterr().out
    assert resolve(RunFolder.open(whole.path).config()) == wanted


def test_a_mixture_begins_with_the_weights_of_both_runs_and_keeps_them(bases, tmp_path):
    trainer = Trainer(mixture(bases, robust=str(bases / "h" / "checkpoints" / "best")), out=tmp_path / "run")
    for part, run, checkpoint in (("accurate", "g", "last"), ("robust", "h", "best")):
        weights = read_weights(bases / run / "checkpoints" / checkpoint / "weights.safetensors")
        own = getattr(trainer.model, part).state_dict()
        assert weights.keys() == own.keys()
        assert all(torch.equal(own[name], value) for name, value in weights.items())


def test_a_recipe_that_would_train_the_networks_of_a_mixture_is_refused(bases):
    with pytest.raises(InputError, match="PGD-AT would train both networks of a mixture"):
        mixture(bases, method=[{"name": "pgd-at"}])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"accurate": {"name": "small_cnn"}}, r"^model\.accurate is small_cnn without weights, and a mixture"),
        ({"robust": {"name": "smal_cnn"}}, r"^unknown model 'smal_cnn'; did you mean 'small_cnn'"),
        ({"robust": "nowhere"}, "^nowhere is not a run folder"),
        ({"robust": 3}, r"^model\.robust is 3; it must be a mapping"),
        ({"alpha_range": [0.9, 0.1]}, r"^alpha_range is \[0\.9, 0\.1\]"),
        ({"width": 3}, r"^unknown key in model: 'width'"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(bases, model, message):
    with pytest.raises(InputError, match=message):
        mixture(bases, **model)


def test_a_run_without_a_checkpoint_has_no_network_to_mix(bases, tmp_path):
    shutil.copytree(bases / "g", tmp_path / "g", ignore=shutil.ignore_patterns("last*"))
    with pytest.raises(InputError, match=r"no checkpoint in .*last; has the run finished an epoch yet"):
        network_of(str(tmp_path / "g"))


def test_a_damaged_checkpoint_is_not_mixed_but_the_one_before_it_is(bases, tmp_path):
    run = shutil.copytree(bases / "g", tmp_path / "g")
    last, old = run / "checkpoints" / "last", run / "checkpoints" / "last.old"
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(last, old)
    content = bytearray((last / "weights.safetensors").read_bytes())
    content[-1] ^= 1  # of a weight: the file can still be read
    (last / "weights.safetensors").write_bytes(content)

    with pytest.warns(Notice, match="last is damaged: weights.safetensors is not as it was written; the one before"):
        assert network_of(str(run)).weights == str(old / "weights.safetensors")
    shutil.rmtree(old)
    with pytest.raises(InputError, match="is not as it was written; there is no other"):
        network_of(str(run))


def test_two_runs_are_mixed_with_a_constant_weight_in_one_line(bases, capsys):
    def accuracies(*words):
        command = ["evaluate", str(bases / "h"), "--attacks", "clean", "--device", "cpu", *words]
        assert main(command) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "%" in line]

    files = {file: file.stat().st_mtime_ns for file in (bases / "h").rglob("*") if file.is_file()}
    assert accuracies("--accurate", str(bases / "g"), "--alpha", "0.5")
    after = {file: file.stat().st_mtime_ns for file in (bases / "h").rglob("*") if file.is_file()}
    assert after == files  # what a mixture scores is no result of the run
    assert accuracies("--accurate", str(bases / "g"), "--alpha", "1") == accuracies()


def test_a_mixture_of_another_weight_is_measured_anew(bases, tmp_path, capsys):
    for alpha, reused in (("0.5", False), ("0.9", False), ("0.9", True)):
        words = ["--accurate", str(bases / "g"), "--alpha", alpha, "--attacks", "clean", "--device", "cpu"]
        assert main(["evaluate", str(bases / "h"), *words, "--out", str(tmp_path)]) == 0
        assert ("as measured before" in capsys.readouterr().err) == reused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "0.5"], "--accurate RUN and --alpha A go together"),
        (["--accurate", "g", "--alpha", "2"], "alpha is 2.0; it must be a number in [0, 1]"),
    ],
)
def test_half_a_mixture_on_the_command_line_is_refused(bases, words, message, capsys, monkeypatch):
    monkeypatch.chdir(bases)
    assert main(["evaluate", "h", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
