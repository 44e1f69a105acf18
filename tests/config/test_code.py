"""A recipe of anybody's may not name code that runs when it is imported; what the user typed may."""

from pathlib import Path

import pytest
import yaml

from small_runs import document
from toughen.cli import main
from toughen.config import load_recipe, network_of, recipe_of, resolve
from toughen.errors import InputError
from toughen.run_folder import RunFolder

MODULE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
from torch import nn
def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
BUILD = {"name": "theirs_alone.nets:build"}
METHOD = [{"name": "half_and_half:HalfAndHalf", "share": 0.3}]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "theirs_alone").mkdir()
    (tmp_path / "theirs_alone" / "__init__.py").touch()
    (tmp_path / "theirs_alone" / "nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOUGHEN_ALLOW_CODE", raising=False)
    return tmp_path


def executed(place: Path) -> bool:
    return (place / "theirs_alone" / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"model": BUILD},
        {"model": {"name": "adaptive_smoothing", "accurate": {**BUILD, "weights": "a"}, "robust": BUILD}},
        {"method": [{"name": "theirs_alone.nets:Method"}]},
        {"method": [{"name": "pgd-at"}, {"name": "theirs_alone.nets:Method"}]},
        {"branch_epoch": 1, "branches": {"one": {"method": [{"name": "theirs_alone.nets:Method"}]}}},
    ],
)
def test_code_that_a_recipe_file_names_is_refused_before_it_is_imported(content: dict[str, object], place: Path):
    (place / "base.yaml").write_text(yaml.safe_dump({"extends": "digits", **content}))
    (place / "sent.yaml").write_text("extends: base.yaml\n")

    for name in ("base.yaml", "sent.yaml"):
        with pytest.raises(
            InputError, match=rf"^recipe {name} names code.*theirs_alone.*--allow-code theirs_alone, or"
        ):
            load_recipe(name)
    assert not executed(place)


def test_code_is_allowed_by_package_in_python_by_the_option_and_by_the_variable(place: Path, monkeypatch, capsys):
    (place / "mine.yaml").write_text(yaml.safe_dump({"extends": "digits", "method": METHOD, "branches": {"a": {}}}))
    assert main(["train", "mine.yaml", "--dry-run"]) == 2
    assert main(["train", "mine.yaml", "--dry-run", "--allow-code", "half"]) == 2
    assert main(["train", "mine.yaml", "--dry-run", "--allow-code", "half_and_half"]) == 0
    assert "half_and_half:HalfAndHalf" in capsys.readouterr().out
    assert load_recipe("mine.yaml", allow_code=["half_and_half"]).method.label == "half and half"
    monkeypatch.setenv("TOUGHEN_ALLOW_CODE", "other, half_and_half")
    assert load_recipe("mine.yaml").method.label == "half and half"


def test_code_that_the_user_types_needs_no_further_word(place: Path):
    typed = load_recipe("digits", ['method=[{name: "half_and_half:HalfAndHalf", share: 0.3}]', "branches.clat=null"])
    assert typed.method.label == "half and half"
    assert resolve(document(method=METHOD)).method.label == "half and half"


def test_what_no_package_can_be_called_is_not_offered_to_be_allowed(place: Path):
    for name in (":build", ".theirs_alone.nets:build", "timm/x:y"):
        (place / "odd.yaml").write_text(yaml.safe_dump({"extends": "digits", "model": {"name": name}}))
        with pytest.raises(InputError, match=r"recipe odd\.yaml names .* not of the form package\.module:name"):
            load_recipe("odd.yaml")


def test_a_run_folder_of_somebody_else_runs_no_code(place: Path, capsys: pytest.CaptureFixture[str]):
    content = resolve(document(method=METHOD)).document()
    RunFolder.create(place / "sent", {**content, "model": {**content["model"], **BUILD}}, {})
    run = RunFolder.open(place / "sent")

    for refused in (
        ["train", "--resume", "sent"],
        ["evaluate", "sent"],
        ["analyze", "sent"],
        ["transfer", "sent", "small_cnn"],
        ["list", "layers", "sent"],
        ["evaluate", "small_cnn", "--accurate", "sent", "--alpha", "0.5"],
    ):
        assert main(refused) == 2
        told = capsys.readouterr().err
        assert "toughen: run sent names code that is not toughen's, 'theirs_alone.nets:build'" in told
    for read in (lambda: recipe_of(run), lambda: network_of("sent")):
        with pytest.raises(InputError, match="add --allow-code theirs_alone, or set TOUGHEN_ALLOW_CODE"):
            read()
    assert not executed(place)

    assert recipe_of(run, allow_code=["theirs_alone", "half_and_half"]).model.name == BUILD["name"]
    assert executed(place)
