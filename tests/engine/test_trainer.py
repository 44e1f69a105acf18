import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import toughen
from as_found import same
from small_runs import PGD_AT, clat, fingerprints, log, outcome, recipe, resume, train
from toughen import Trainer, data
from toughen.config import resolve
from toughen.data import DataSettings, DataSplits, ImageSet
from toughen.engine import checkpoint, create_model
from toughen.errors import InputError, Notice
from toughen.evaluation import EvalAttack, evaluate
from toughen.run_folder import RunFolder


def weights(run: RunFolder, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints / name / "weights.safetensors")


# -- frozen layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"base": "inner", "lam": 0.0}], ids=["eq6", "base-inner"])
def test_two_epochs_of_clat_leave_every_frozen_layer_bit_for_bit(tmp_path, settings):
    plan = {"epochs": 4, "schedule": "constant"}
    run = train(tmp_path / "run", train=plan, branch_epoch=2, branches={"clat": clat(**settings)})
    branch = run.branch("clat")
    selected = branch.log()[-1]["selected"]

    before, after = weights(run), weights(branch)

    moved = {name for name in before if not same(before[name], after[name])}
    assert moved == {f"{layer}.weight" for layer in selected}
    assert branch.log()[-1]["trainable_share"] < 0.5


def test_norm_stats_update_lets_statistics_move_but_no_frozen_parameter(tmp_path):
    run = train(
        tmp_path / "run", train={"epochs": 3}, branch_epoch=1, branches={"clat": clat(norm_stats="update", lam=0.03)}
    )
    before, after = weights(run), weights(run.branch("clat"))
    moved = {name for name in before if not same(before[name], after[name])}
    [selected] = run.branch("clat").log()[-1]["selected"]
    assert {name for name in moved if "running" not in name and "num_batches" not in name} == {f"{selected}.weight"}
    assert any("running_mean" in name for name in moved)


# -- branches -----------------------------------------------------------------------------------


def test_a_branch_without_changes_ends_with_the_weights_of_a_run_without_branches(tmp_path):
    plan = {"epochs": 4}
    straight = train(tmp_path / "straight", train=plan)
    run = train(tmp_path / "run", train=plan, branch_epoch=2, branches={"clat": clat(), "pgd-at": {}})

    assert (
        fingerprints(run.branch("pgd-at"))["checkpoints/last/weights.safetensors"]
        == (fingerprints(straight)["checkpoints/last/weights.safetensors"])
    )
    assert log(run) + log(run.branch("pgd-at")) == log(straight)


def test_a_branch_does_not_depend_on_its_neighbours(tmp_path):
    plan = {"epochs": 3}
    alone = train(tmp_path / "alone", train=plan, branch_epoch=1, branches={"clat": clat(select="random")})
    others = {"a": {}, "b": {"train": {"seed": 5}}, "clat": clat(select="random")}
    among = train(tmp_path / "among", train=plan, branch_epoch=1, branches=others)
    assert outcome(among.branch("clat")) == outcome(alone.branch("clat"))


def test_another_seed_of_a_branch_changes_what_it_draws(tmp_path):
    branches = {"same": {}, "other": {"train": {"seed": 5}}}
    run = train(tmp_path / "run", train={"epochs": 2}, branch_epoch=1, branches=branches)
    assert not same(*(weights(run.branch(name))["linear.weight"] for name in branches))


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"momentum": 0.0}, {"lr": 0.5}, {"schedule": "constant"}], ids=str
)
def test_a_training_setting_of_a_branch_takes_effect(tmp_path, change):
    branches = {"same": {}, "other": {"train": change}}
    run = train(tmp_path / "run", train={"epochs": 3}, branch_epoch=1, branches=branches)
    assert not same(*(weights(run.branch(name))["linear.weight"] for name in branches))


def test_a_branch_with_another_optimizer_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"'other'.*optimizer.*adamw.*sgd"):
        recipe(branch_epoch=1, branches={"other": {"train": {"optimizer": "adamw"}}})


def test_a_branch_that_ends_before_it_begins_is_refused_before_training():
    with pytest.raises(InputError, match=r"branch 'short'.*train\.epochs.*2.*branch_epoch.*3"):
        recipe(train={"epochs": 5}, branch_epoch=3, branches={"short": {"train": {"epochs": 2}}})


def test_global_random_state_decides_nothing(tmp_path):
    torch.manual_seed(1)
    first = train(tmp_path / "first", **clat(select="random"))
    torch.manual_seed(2)
    second = train(tmp_path / "second", **clat(select="random"))
    assert outcome(first) == outcome(second)


def test_another_seed_is_another_run(tmp_path):
    runs = [train(tmp_path / str(seed), train={"seed": seed}) for seed in (0, 1)]
    assert log(runs[0]) != log(runs[1])


# -- validation, best, early stopping -----------------------------------------------------------


def test_the_best_checkpoint_is_the_epoch_with_the_highest_robust_validation_accuracy(tmp_path):
    plan = {"epochs": 6, "lr": 0.3, "schedule": "constant", "seed": 1}
    run = train(tmp_path / "run", train=plan, data={"train_samples": 120})
    robust = [row["validation"]["robust"] for row in run.log()]
    best = 1 + robust.index(max(robust))

    assert {result["epoch"] for result in run.evaluations("best").values()} == {best}
    assert 1 < best < 6, "choose a run whose best epoch is neither the first nor the last"
    expected = train(tmp_path / "short", train={**plan, "epochs": best}, data={"train_samples": 120})
    assert all(same(value, weights(expected)[name]) for name, value in weights(run, "best").items())


def test_the_logged_validation_is_what_an_evaluation_of_the_checkpoint_measures(tmp_path):
    wanted = recipe()
    run = Trainer(wanted, out=tmp_path / "run").fit()
    splits = data.load(wanted.data)
    model = create_model(wanted.model, splits)
    checkpoint.load(run.checkpoints / "last", model)
    attacks = [EvalAttack("clean", None), EvalAttack("robust", wanted.attack)]
    batches = data.in_order(splits.validation, batch_size=250, device="cpu")

    results = evaluate(model, batches, attacks, seed=wanted.train.seed)

    logged = run.log()[-1]["validation"]
    assert logged == {"clean": results["clean"].accuracy, "robust": results["robust"].accuracy, "n": 20}


def test_as_many_training_images_are_measured_the_same_each_time_so_that_the_gap_is_seen(tmp_path):
    torch.manual_seed(0)
    still = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no batch norm, whose statistics would move
    run = Trainer(recipe(train={"epochs": 2, "lr": 0.0}), out=tmp_path / "run", model=still).fit()
    first, last = (row["training"] for row in run.log())
    assert first == last
    assert first["n"] == 20
    assert first != run.log()[0]["validation"]


def test_a_few_images_are_kept_with_what_the_attack_makes_of_them_and_what_the_network_says(tmp_path):
    wanted = recipe()
    run = Trainer(wanted, out=tmp_path / "run").fit()
    splits = data.load(wanted.data)
    model = create_model(wanted.model, splits)
    checkpoint.load(run.checkpoints / "last", model)
    kept = load_file(run.examples("last"))
    assert torch.equal(kept["x"], next(iter(data.in_order(splits.test, batch_size=8, device="cpu"))).x)
    away = (kept["x_adv"] - kept["x"]).abs().amax((1, 2, 3))
    assert away.max() <= wanted.threat.eps + 1e-6
    assert away.min() > 0
    with torch.no_grad():
        assert torch.equal(model.eval()(kept["x_adv"]).argmax(1), kept["predicted_adv"])
        assert torch.equal(model(kept["x"]).argmax(1), kept["predicted"])
    assert run.examples("best").is_file()


def test_validation_happens_every_so_many_epochs_and_at_the_end(tmp_path):
    run = train(tmp_path / "run", train={"epochs": 5, "validate_every": 2})
    assert [row["epoch"] for row in run.log() if "validation" in row] == [2, 4, 5]


def test_early_stopping_ends_the_run_after_patience_epochs_without_a_better_one(tmp_path):
    # a rate of zero changes no weight but batch-norm's statistics, so soon nothing gets better
    run = train(tmp_path / "run", train={"epochs": 12, "lr": 0.0, "patience": 2})
    robust = [row["validation"]["robust"] for row in run.log()]
    best = 1 + robust.index(max(robust))
    assert len(robust) == best + 2 < 12
    assert run.finished


def test_early_stopping_waits_for_a_validation_before_it_judges(tmp_path):
    run = train(tmp_path / "run", train={"epochs": 6, "lr": 0.0, "patience": 1, "validate_every": 3})
    assert [row["epoch"] for row in run.log() if "validation" in row][:1] == [3]
    assert run.evaluations("best").keys() == {"clean", "pgd-2"}


def test_a_branch_of_a_run_with_patience_gets_its_own_patience(tmp_path):
    plan = {"epochs": 8, "lr": 0.0, "patience": 2}
    run = train(tmp_path / "run", train=plan, branch_epoch=4, branches={"on": {}})
    assert len(run.branch("on").log()) >= 2


def test_a_setting_that_changes_nothing_in_one_process_is_told(tmp_path):
    with pytest.warns(Notice, match=r"train\.strategy=fsdp and train\.batch_norm=local changes nothing in one process"):
        Trainer(recipe(train={"strategy": "fsdp", "batch_norm": "local"}), out=tmp_path / "run")


# -- costs --------------------------------------------------------------------------------------


def test_pgd_at_costs_what_pgd_at_costs_and_clean_training_less(tmp_path):
    ratios = {}
    for name in ("pgd-at", "clean"):
        row = train(tmp_path / name, train={"epochs": 1}, method=[{"name": name}]).log()[-1]
        ratios[name] = row["gflops_per_image"] / row["pgd_at_gflops_per_image"]
    assert ratios["pgd-at"] == 1
    assert ratios["clean"] < 0.5  # the attack's 2 steps of 2 passes are saved, of 7 passes in all


def test_what_pgd_at_costs_does_not_depend_on_adapters_that_the_method_attaches(tmp_path):
    methods = {"plain": [PGD_AT], "adapted": [PGD_AT, {"name": "lora", "rank": 2}]}
    costs = [train(tmp_path / name, train={"epochs": 1}, method=m).log()[-1] for name, m in methods.items()]
    assert costs[0]["pgd_at_gflops_per_image"] == costs[1]["pgd_at_gflops_per_image"]


def test_a_log_row_holds_what_the_design_promises(tmp_path):
    run = train(tmp_path / "run", train={"epochs": 2}, **clat(start_epoch=1, lam=0.03))
    before, after = run.log()
    assert before["epoch"] == 1
    assert before["losses"].keys() == {"loss", "adv_ce"}
    assert before["trainable_share"] == 1
    assert before["selected"] is None
    assert after["losses"].keys() == {"loss", "clean_ce", "feature"}
    assert after["losses"]["loss"] == pytest.approx(
        after["losses"]["clean_ce"] + after["lam"] * after["losses"]["feature"]
    )
    assert after["lam"] == 0.03
    assert before["gflops_per_image"] == before["pgd_at_gflops_per_image"] == after["pgd_at_gflops_per_image"]
    assert after["gflops_per_image"] != before["gflops_per_image"], "a new selection has another cost"
    assert after["selected"] == run.reports()[1]["selected"]
    assert after["seconds"] > 0
    assert after["images_per_second"] == pytest.approx(60 / after["seconds"])


# -- the run folder -----------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_design_promises(tmp_path):
    branches = {"pgd-at": {}, "clat": clat()}
    run = train(tmp_path / "run", train={"epochs": 2}, branch_epoch=1, branches=branches)
    for member in (run, *run.branches()):
        files = {str(file.relative_to(member.path)) for file in member.path.rglob("*") if file.is_file()}
        files = {file for file in files if not file.startswith("branches")}
        reports = {"criticality/epoch_0001.json"} if member.path.name == "clat" else set()
        assert files >= {"config.yaml", "provenance.json", "log.jsonl", "finished.json", *reports}
        for name, attack in itertools.product(("last", "best"), ("clean", "pgd-2")):
            assert f"checkpoints/{name}/weights.safetensors" in files
            assert f"evals/{name}/{attack}.json" in files
        assert not [file for file in files if file.endswith((".tmp", ".old"))]
    assert [branch.path.name for branch in run.branches()] == ["pgd-at", "clat"]


def test_evaluations_hold_the_outcome_of_every_sample(tmp_path):
    run = train(tmp_path / "run")
    for result in run.evaluations("last").values():
        assert len(result["correct"]) == result["n"] == 40
        assert set(result["correct"]) <= {0, 1}
        assert result["accuracy"] == sum(result["correct"]) / 40


def test_provenance_tells_versions_hardware_seed_and_no_path_of_this_machine(tmp_path):
    run = train(tmp_path / "run", train={"seed": 3})
    text = (run.path / "provenance.json").read_text()
    facts = json.loads(text)
    assert facts["seed"] == 3
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts.keys() >= {"command", "commit", "device", "precision", "python", "system", "threads", "started"}
    assert str(Path(__file__).parents[2]) not in text
    assert str(Path.home()) not in text


def test_a_copy_of_the_package_that_is_not_the_installed_one_tells_no_commit(tmp_path):
    source = Path(toughen.__file__).parent
    shutil.copytree(source, tmp_path / "toughen", ignore=shutil.ignore_patterns("__pycache__"))
    ask = (
        "import torch; from toughen.engine.provenance import provenance;"
        "print(provenance(seed=0, device=torch.device('cpu'), precision='32-true')['commit'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout == "None\n"


def test_the_stored_recipe_is_the_resolved_one(tmp_path):
    wanted = recipe(branch_epoch=1, branches={"clat": clat()})
    run = Trainer(wanted, out=tmp_path / "run").fit()
    assert resolve(run.config()) == wanted


def test_without_out_runs_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [Trainer(recipe(train={"epochs": 1})).fit().path for _ in range(2)]
    assert [str(path) for path in paths] == ["runs/small_cnn-digits", "runs/small_cnn-digits-2"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_that_holds_a_run_is_refused_and_kept(tmp_path, finished):
    run = train(tmp_path / "run", train={"epochs": 1})
    if not finished:
        (run.path / "finished.json").unlink()
    before = outcome(run)
    expected = "already holds a finished run" if finished else "already holds an unfinished run.*--resume"
    with pytest.raises(InputError, match=expected):
        Trainer(recipe(), out=run.path)
    assert outcome(run) == before


# -- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_steps", [None, 1])
def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_earlier_checkpoint(tmp_path, checkpoint_steps):
    wanted = recipe(train={"epochs": 3, "checkpoint_steps": checkpoint_steps})
    model = create_model(wanted.model, data.load(wanted.data), seed=0)

    def spoil(_module: nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor | None:
        return out * float("nan") if model.training and len(RunFolder(tmp_path / "run").log()) == 2 else None

    model.register_forward_hook(spoil)

    with pytest.raises(InputError, match=r"gradient is not finite in epoch 3, step 1 .*lower train\.lr"):
        Trainer(wanted, out=tmp_path / "run", model=model).fit()

    run = RunFolder(tmp_path / "run")
    assert [row["epoch"] for row in run.log()] == [1, 2]
    fresh = create_model(wanted.model, data.load(wanted.data))
    assert checkpoint.load(run.checkpoints / "last", fresh)["epoch"] == 2
    assert all(bool(value.isfinite().all()) for value in weights(run).values())
    assert resume(run.path).finished, "without the spoiled network it goes on to the end"


@pytest.mark.parametrize(
    "sections",
    [clat(k=7, start_epoch=1), {"branch_epoch": 1, "branches": {"clat": clat(k=7)}}],
    ids=["in the run", "in a branch"],
)
def test_more_layers_than_the_model_has_are_refused_before_anything_is_written(tmp_path, sections):
    with pytest.raises(InputError, match="k is 7; SmallCNN has 6 layers to choose from, so k must be 1 to 6"):
        Trainer(recipe(**sections), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_fixed_layer_is_refused_before_anything_is_written(tmp_path):
    wanted = recipe(method=[PGD_AT, {"name": "clat", "start_epoch": 1, "select": "fixed", "layers": ["layer3.0.cov"]}])
    with pytest.raises(InputError, match=r"unknown layer 'layer3\.0\.cov'; did you mean 'layer3\.0\.conv'"):
        Trainer(wanted, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="batch_size is 61; with 60 images"):
        Trainer(recipe(train={"batch_size": 61}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("attack", ["pgd20", "pgd-0", "autoatack"])
def test_an_unknown_attack_of_the_final_evaluation_is_refused_before_training(attack):
    with pytest.raises(InputError, match=f"attack '{attack}'"):
        recipe(evaluate={"attacks": ["clean", attack]})


@pytest.mark.parametrize(("key", "value"), [("samples", 0), ("samples", -5), ("attacks", [])])
def test_an_evaluation_of_nothing_is_refused_before_training(key, value):
    with pytest.raises(InputError, match=rf"evaluate\.{key} is {re.escape(str(value))}"):
        recipe(evaluate={key: value})


# -- from Python --------------------------------------------------------------------------------


class OwnNet(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean(dim=(2, 3)))


def own_images(count: int, seed: int) -> ImageSet:
    """Bright images are of one class, dark ones of the other."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=draw)
    images = torch.randint(0, 100, (count, 3, 6, 6), generator=draw) + 150 * labels[:, None, None, None]
    return ImageSet(images.to(torch.uint8), labels, ("dark", "bright"))


def test_your_own_network_and_images_are_trained(tmp_path):
    splits = DataSplits("own", own_images(80, 0), own_images(20, 1), own_images(30, 2))
    torch.manual_seed(0)
    model = OwnNet()
    wanted = recipe(train={"epochs": 6, "lr": 0.5}, threat={"eps": 0.05}, attack={"step_size": 0.02})

    run = Trainer(wanted, out=tmp_path / "run", model=model, data=splits).fit()

    assert run.evaluations("last")["clean"]["accuracy"] > 0.9
    assert run.evaluations("last")["clean"]["n"] == 30


def test_the_model_ends_with_the_last_weights_and_trainable(tmp_path):
    plan = {"epochs": 6, "lr": 0.3, "schedule": "constant", "seed": 1}
    wanted = recipe(train=plan, data={"train_samples": 120}, **clat(start_epoch=5))
    model = create_model(wanted.model, data.load(wanted.data), seed=0)
    run = Trainer(wanted, out=tmp_path / "run", model=model).fit()
    assert run.evaluations("best")["clean"]["epoch"] < 6
    assert all(same(value, weights(run)[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_labels_and_statistics_of_the_training_images_shape_the_network():
    splits = data.load(DataSettings(name="digits", validation=20))
    model = create_model(recipe().model, splits, seed=0)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert model.normalize.mean.flatten().tolist() == pytest.approx(splits.mean)


def test_a_run_hands_its_forwards_to_the_compiler_where_its_recipe_says_so_and_stays_the_run_it_is(
    tmp_path, monkeypatch
):
    handed_over = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: handed_over.append(forward) or forward)
    plain = train(tmp_path / "plain", **clat())
    assert handed_over == []
    compiled = train(tmp_path / "compiled", **clat(), train={"compile": True})
    assert len(handed_over) >= 2  # the network, and the part of it that CLAT attacks
    assert fingerprints(compiled) == fingerprints(plain)


def test_without_the_compiler_that_torch_would_call_it_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"train\.compile needs a C\+\+ compiler .* finds no no-such-compiler"):
        train(tmp_path, train={"compile": True})


def test_a_recording_that_can_not_be_made_is_told(tmp_path):
    with pytest.warns(Notice, match=r"attack\.cuda_graph changes nothing on a CPU"):
        train(tmp_path / "run", attack={"cuda_graph": True}, train={"epochs": 1})
