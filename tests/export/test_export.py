"""A trained network leaves its run folder, and is the same network elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import toughen as tg
from small_runs import PGD_AT, train
from toughen.cli import main
from toughen.config import recipe_of
from toughen.engine import checkpoint, create_model
from toughen.export import Facts, export, facts_of_run
from toughen.export.card import eps_text, model_card
from toughen.export.robustbench import robustbench_entry, write_robustbench
from toughen.run_folder import RunFolder
from toughen.statistics import wilson_interval


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A run with an average, so that what it trained and what it deploys are two networks; and a branch."""
    branches = {"clat": {"method": [PGD_AT, {"name": "clat", "k": 1, "base": "inner", "lam": 0}]}}
    method = [PGD_AT, {"name": "ema", "decay": 0.5}]
    settings = {"epochs": 4, "lr": 0.1}
    folder = tmp_path_factory.mktemp("runs") / "small"
    return train(folder, method=method, branches=branches, branch_epoch=1, train=settings)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "network"
    assert main(["export", str(run.path), "--to", str(folder), "--license", "mit"]) == 0
    return folder


@pytest.fixture(scope="module")
def facts(run) -> Facts:
    recipe = recipe_of(run)
    splits = tg.data.load(recipe.data)
    model = create_model(recipe.model, splits)
    epoch = checkpoint.load(run.checkpoints / "last", model)["epoch"]
    return facts_of_run(
        run, recipe.model, model, splits, threat=recipe.threat, step_size=0.05, checkpoint="last", epoch=epoch
    )


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_exported_network_is_the_one_that_the_run_deploys(run, exported):
    model = tg.models.load(exported)

    deployed = tg.models.create("small_cnn", width=2, num_classes=10, in_channels=1)
    state = checkpoint.load(run.checkpoints / "last", deployed)
    assert not model.training
    assert torch.equal(model(images()), deployed.eval()(images()))
    trained = state["training"]
    assert any(not torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_an_exported_folder_is_a_target_and_measures_as_the_run_did(run, exported, tmp_path, capsys):
    runs = run.evaluations("last")["pgd-2"]
    facts = ["--attacks", "clean,pgd-2", "--samples", "40", "--json", str(tmp_path / "found.json")]

    assert main(["evaluate", str(exported), *facts]) == 0

    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pgd-2"]["correct"] == runs["correct"]
    assert "linf eps 0.15, step size 0.05" in capsys.readouterr().out


def test_the_card_tells_accuracy_with_its_interval_and_how_it_came_about(run, exported):
    card = ModelCard.load(exported / "README.md")
    found = run.evaluations("last")

    assert card.data.license == "mit"
    assert card.data.library_name == "toughen"
    metrics = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert metrics == {
        "accuracy": pytest.approx(found["clean"]["accuracy"], abs=1e-4),
        "accuracy under pgd-2, linf eps 0.15": pytest.approx(found["pgd-2"]["accuracy"], abs=1e-4),
    }
    interval = wilson_interval(sum(found["pgd-2"]["correct"]), 40)
    accuracy = f"{100 * found['pgd-2']['accuracy']:.2f}"
    assert f"| pgd-2 | {accuracy} | {100 * interval.low:.1f} to {100 * interval.high:.1f} | 40 |" in card.text
    assert f"Commit of toughen: {run.provenance()['commit']}" in card.text
    assert "PGD-AT + EMA" in card.text
    assert "toughen evaluate FOLDER --data digits --attacks clean,pgd-2" in card.text


def test_onnxruntime_computes_the_same_for_any_batch_size(run, exported, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: toughen[onnx]")

    assert main(["export", str(run.path), "--to", str(tmp_path / "to"), "--format", "onnx"]) == 0

    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["README.md", "model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "to/model.onnx"), providers=["CPUExecutionProvider"])
    model = tg.models.load(exported)

    for count in (1, 7):
        (logits,) = session.run(["logits"], {"images": images(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images(count)).detach(), rtol=1e-4, atol=1e-5)


def test_a_branch_and_its_best_checkpoint_are_exported_too(run, tmp_path, capsys):
    branch = run.branch("clat")

    assert main(["export", str(branch.path), "--to", str(tmp_path / "clat"), "--checkpoint", "best"]) == 0

    best, last = (load_file(branch.checkpoints / name / "weights.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(value, last[name]) for name, value in best.items()), "or the test shows nothing"
    written = load_file(tmp_path / "clat" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in written.items())
    card = ModelCard.load(tmp_path / "clat" / "README.md")
    assert "clat" in card.data.tags
    assert "Layers that trained at the end: `layer" in card.text
    assert f"checkpoint `best`, after {checkpoint.read_state(branch.checkpoints / 'best')['epoch']} epochs" in card.text
    assert "names no licence" in capsys.readouterr().err


def test_a_network_of_timm_comes_back(tmp_path):
    run = train(tmp_path / "run", model={"name": "timm/test_resnet", "width": None}, train={"epochs": 1})

    assert main(["export", str(run.path), "--to", str(tmp_path / "to")]) == 0

    recipe = recipe_of(run)
    model = create_model(recipe.model, tg.data.load(recipe.data))
    checkpoint.load(run.checkpoints / "last", model)
    assert torch.equal(tg.models.load(tmp_path / "to")(images()), model.eval()(images()))


# -- RobustBench ------------------------------------------------------------------------------------------------------


def as_cifar10(facts: Facts, *, n: int = 10_000) -> Facts:
    """The same, as if it had been measured on CIFAR-10, with AutoAttack too."""
    network = replace(facts.network, data="cifar10", eps=8 / 255)
    found = {
        name: {**facts.evaluations["clean"], "attack": name, "accuracy": accuracy, "n": n}
        for name, accuracy in (("clean", 0.85341), ("standard", 0.53416))
    }
    return replace(facts, name="Gopal2025CLAT", network=network, evaluations=found)


def test_robustbenchs_entry_has_what_is_known_and_null_for_what_only_the_user_knows(facts):
    entry = robustbench_entry(as_cifar10(facts))

    assert entry == {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": None,
        "architecture": "small_cnn",
        "eps": "8/255",
        "clean_acc": "85.34",
        "reported": None,
        "autoattack_acc": "53.42",
        "unreliable": False,
    }
    few = robustbench_entry(as_cifar10(facts, n=1000))
    assert few["clean_acc"] is few["autoattack_acc"] is None


def test_robustbenchs_weights_hold_the_statistics_and_lie_where_it_looks_for_them(facts, tmp_path):
    model = tg.models.create("small_cnn", width=2, num_classes=10, in_channels=1, seed=0)

    files, missing = write_robustbench(model, as_cifar10(facts), tmp_path)

    weights = torch.load(tmp_path / "models/cifar10/Linf/Gopal2025CLAT.pt", weights_only=True)
    assert torch.equal(weights["normalize.mean"], model.normalize.mean)
    assert json.loads((tmp_path / "model_info/cifar10/Linf/Gopal2025CLAT.json").read_text())["eps"] == "8/255"
    assert "- **Clean accuracy**: 85.34" in (tmp_path / "new-model.md").read_text()
    assert missing == ["link", "name", "authors", "venue", "reported"]
    assert all((tmp_path / name).is_file() for name in files)


# -- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for ``huggingface_hub.HfApi``."""

    uploads: list[tuple[str, list[str]]]
    refuses: str | None = None

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        if Hub.refuses:
            raise OSError(Hub.refuses)
        return f"https://huggingface.co/{repo_id}?private={private}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Hub.uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch):
    Hub.uploads, Hub.refuses = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return Hub


def test_the_folder_is_pushed_when_a_token_is_there(run, hub, tmp_path, capsys):
    push = ["--push-to-hub", "someone/robust", "--private"]

    assert main(["export", str(run.path), "--to", str(tmp_path / "to"), *push]) == 0

    assert hub.uploads == [("someone/robust", ["README.md", "config.json", "model.safetensors"])]
    assert "pushed to https://huggingface.co/someone/robust?private=True" in capsys.readouterr().out


def test_without_a_token_nothing_is_done_and_one_line_says_how_to_get_one(run, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    assert main(["export", str(run.path), "--to", str(tmp_path / "to"), "--push-to-hub", "someone/robust"]) == 2

    assert "no token for the Hugging Face hub: run `hf auth login`, or set HF_TOKEN" in one_line(capsys)
    assert not (tmp_path / "to").exists()


def test_a_push_that_fails_leaves_the_folder_and_can_be_repeated(run, hub, tmp_path, capsys):
    hub.refuses = "the network is down"
    command = ["export", str(run.path), "--to", str(tmp_path / "to"), "--push-to-hub", "someone/robust"]

    assert main(command) == 2
    assert "can't push to someone/robust: the network is down" in one_line(capsys)
    hub.refuses = None
    assert main(command) == 0
    assert len(hub.uploads) == 1


# -- mistakes ---------------------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a mistake; notes may stand before it."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("toughen: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "tensorflow"], "unknown format 'tensorflow'"),
        (["--format", "robustbench"], "RobustBench has tables for cifar10, cifar100, imagenet, and this network was"),
        (["--private"], "--private is about the repository of --push-to-hub"),
        (["--push-to-hub", "robust"], "--push-to-hub is 'robust'; it must be OWNER/NAME"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(run, tmp_path, capsys, words, message):
    assert main(["export", str(run.path), "--to", str(tmp_path / "to"), *words]) == 2

    assert message in one_line(capsys)
    assert not (tmp_path / "to").exists()


def test_a_folder_with_other_things_in_it_is_not_written_to(run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")

    assert main(["export", str(run.path), "--to", str(tmp_path)]) == 2

    assert "holds other things, such as thesis.tex" in one_line(capsys)


def test_what_is_no_run_folder_is_refused(exported, tmp_path, capsys):
    for target in ("small_cnn", str(exported)):
        assert main(["export", target, "--to", str(tmp_path / "to")]) == 2
        assert f"{target} is no run folder" in one_line(capsys)


def test_a_checkpoint_that_was_not_evaluated_has_no_card(run, facts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunFolder, "evaluations", lambda self, checkpoint: {})

    assert main(["export", str(run.path), "--to", str(tmp_path / "to")]) == 2

    assert "has no evaluation of its checkpoint 'last'" in one_line(capsys)


def test_a_config_of_anybodys_runs_no_code(exported, tmp_path, capsys):
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "antigravity:fly"}))

    with pytest.raises(tg.InputError, match="names code that is not toughen's, 'antigravity:fly'"):
        tg.models.load(tmp_path)
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "add --allow-code antigravity" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"toughen_network": 99}, "is of form 99"),
        ({"classes": "ten"}, "its entry 'classes' is missing, or of another kind"),
        ({"norm": "l7"}, "its entry 'norm' is missing, or of another kind"),
        ({"width": 3}, "belongs to another model"),
        ({"model": "resnet1"}, "unknown model 'resnet1'"),
        ({"toughen_network": None}, "was not written by `toughen export`"),
    ],
)
def test_a_damaged_config_is_told_in_one_line(exported, tmp_path, change, message):
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))

    with pytest.raises(tg.InputError, match=message):
        tg.models.load(tmp_path)


def test_a_name_cannot_break_out_of_the_card(facts):
    hostile = {"a|b": {**facts.evaluations["clean"], "attack": "a|b"}}

    text = model_card(replace(facts, name="a\n---\n# b | c", evaluations=hostile), files={})

    assert "| a\\|b |" in text
    assert "\n# b" not in text.partition("\n---\n")[2]
    assert ModelCard(text).data.model_name == "a\n---\n# b | c"


def test_the_card_keeps_folders_of_the_machine_to_itself(facts):
    secret = {**facts.provenance, "command": "toughen train r data.path=/data/me/cifar --out '/runs/me/one'"}

    text = model_card(replace(facts, provenance=secret), files={})

    assert "toughen train r data.path=.../cifar --out '.../one'" in text


def test_a_radius_is_written_as_the_field_writes_it():
    assert [eps_text(eps) for eps in (8 / 255, 0.5, 0.15, 4 / 255, 0.031)] == ["8/255", "0.5", "0.15", "4/255", "0.031"]


def test_export_takes_the_formats_by_name(facts, tmp_path):
    with pytest.raises(tg.InputError, match="unknown format"):
        export(torch.nn.Identity(), facts, tmp_path / "w", tmp_path / "to", formats=["keras"])
