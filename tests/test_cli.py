import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from small_runs import SHRINK, clat, fingerprints, outcome, recipe, timeless, train
from toughen import PGD, ThreatModel, Trainer, analyze, data, evaluate, models
from toughen.cli import main
from toughen.errors import InputError
from toughen.evaluation import parse_attack
from toughen.run_folder import RunFolder

VERBS = ("train", "analyze", "evaluate", "transfer", "compare", "report", "export", "sweep", "reproduce", "list")
DIGITS = [*SHRINK, "train.epochs=2", "branch_epoch=1"]


class Said(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def toughen(capsys):
    """Runs a command line in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(toughen):
    """Asserts that a command is refused as the user's mistake in one line that holds all the given words."""

    def check(words: list[object], *expected: object) -> str:
        said = toughen(*words)
        assert said.status == 2, said
        last = [line for line in said.err.splitlines() if not line.startswith("note: ")]
        assert len(last) == 1, said.err
        assert last[0].startswith("toughen: ")
        assert said.out == ""
        for part in expected:
            assert str(part) in said.err, said.err
        return said.err

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    """A finished run with two branches; read only."""
    branches = {"pgd-at": {}, "clat": clat(lam=0.03)}
    return train(tmp_path_factory.mktemp("finished") / "run", branch_epoch=1, branches=branches)


@pytest.fixture
def own(finished, tmp_path) -> RunFolder:
    """A copy of the finished run that a test may spoil."""
    shutil.copytree(finished.path, tmp_path / "own")
    return RunFolder(tmp_path / "own")


def picture(level: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="png")
    return buffer.getvalue()


def image_folder(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            (root / name / f"{number}.png").write_bytes(picture(20 * number))
    return root


def parquet_folder(root: Path, labels: list[int]) -> Path:
    root.mkdir(parents=True)
    table = pa.table({"img": [picture(10 * row) for row in range(len(labels))], "label": labels})
    card = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    for part in ("train", "test"):
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(card)}), root / f"{part}-0.parquet")
    return root


# -- help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example_and_exits_0(toughen, capsys, verb):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"example:\n  toughen {verb} \w+", text)


def test_help_and_version_exit_0(capsys):
    for flag, expected in (("--help", VERBS), ("--version", ("toughen ",))):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in expected)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tr", {"train", "transfer"}),
        ("train dig", {"digits"}),
        ("evaluate runs/x --norm l", {"linf", "l2"}),
        ("compare fol", {"folder"}),
        ("analyze weights.pth --jso", {"--json"}),
    ],
)
def test_bash_completes_verbs_recipes_choices_options_and_folders(capsys, tmp_path, words, expected):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    (tmp_path / "folder").mkdir()
    typed = f"toughen {words}".split()
    asked = f"COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; _shtab_toughen; echo ${{COMPREPLY[*]}}"
    script = f"{capsys.readouterr().out}\n{asked}\n"
    said = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) == expected


def test_the_example_of_each_help_is_accepted(toughen, capsys, monkeypatch, tmp_path, finished):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.path, tmp_path / "runs" / "small_cnn-digits")
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        found = re.search(r"example:\n  toughen (.*)", capsys.readouterr().out)
        assert found is not None
        words = found[1].split()
        if verb == "train":
            words += [*SHRINK, "--dry-run"]
        if verb in ("evaluate", "transfer"):
            words += ["--samples", "10"]
        assert toughen(*words).status == 0, words


# -- train --------------------------------------------------------------------------------------------


def test_the_default_run_prints_the_selected_layers_and_both_continuations(toughen, tmp_path):
    said = toughen("train", *DIGITS, "--out", tmp_path / "run")
    assert said.status == 0
    run = RunFolder.open(tmp_path / "run")
    [selected] = run.branch("clat").reports()[1]["selected"]
    assert re.search(rf"selection after 1 epochs.*{re.escape(selected)} \*", said.out, flags=re.DOTALL)
    [*_, table] = said.out.split("accuracy on 40 test images")
    for member, name in ((run, "run"), (run.branch("pgd-at"), "run/pgd-at"), (run.branch("clat"), "run/clat")):
        [line] = [line for line in table.splitlines() if re.match(rf"\W*{name} +PGD", line)]
        for attack in ("clean", "pgd-20"):
            figures = [100 * member.evaluations(which)[attack]["accuracy"] for which in ("last", "best")]
            assert re.search(rf"{figures[0]:.1f} ±\d+\.\d \({figures[1]:.1f}\)", line)
        assert f"{100 * member.log()[-1]['trainable_share']:.1f} %" in line
    for file in ("training.png", "branches/clat/criticality.png"):
        with Image.open(run.path / file) as drawn:
            assert drawn.format == "PNG"
        assert file.rpartition("/")[2] in said.err


def test_progress_goes_to_standard_error_and_results_to_standard_output(toughen, tmp_path):
    said = toughen("train", *DIGITS, "--out", tmp_path / "run")
    assert "epoch   1" in said.err
    assert "epoch   1" not in said.out
    assert "FLOPs" in said.out
    assert "FLOPs" not in said.err


def test_dry_run_prints_recipe_and_layers_and_writes_nothing(toughen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = toughen("train", "digits", "train.epochs=77", "--dry-run")
    assert said.status == 0
    assert "epochs: 77" in said.out
    assert "layer3.1.conv" in said.out
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_exits_130_and_its_resume_command_ends_it(toughen, tmp_path, monkeypatch, finished):
    words = [*DIGITS, "--out", tmp_path / "run"]
    whole = tmp_path / "whole"
    assert toughen("train", *DIGITS, "--out", whole).status == 0
    step = Trainer._step

    def stop(self: Trainer, batch: object) -> None:
        step(self, batch)
        if self.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop)
        said = toughen("train", *words)
    assert said.status == 130
    [command] = re.findall(r"toughen (train --resume .*)$", said.err.strip())
    resumed = toughen(*command.split())
    assert resumed.status == 0
    assert "going on after 0 epochs and 2 steps" in resumed.err
    assert fingerprints(RunFolder(tmp_path / "run")) == fingerprints(RunFolder(whole))


# -- train, refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["digit"], ["unknown recipe 'digit'", "did you mean 'digits'"]),
        (["mine.yaml"], ["no recipe file mine.yaml"]),
        (["epochs=1"], ["unknown recipe key 'epochs'", "did you mean train.epochs?"]),
        (["name=resnet18"], ["did you mean model.name or data.name?"]),
        (["trainer.epochs=1"], ["'trainer'", "did you mean 'train'"]),
        (["train.epoch=1"], ["train", "'epoch'", "did you mean 'epochs'"]),
        (["model.name=resnet81"], ["'resnet81'", "did you mean 'resnet18'"]),
        (["train.epochs=many"], ["train.epochs", "'many'", "integer"]),
        (["train.lr=quick", "train.epochs=many"], ["train.epochs", "'many'", "train.lr", "'quick'"]),
        (["threat.eps=-0.1"], ["eps is -0.1"]),
        (["threat.eps=-8/255"], ["threat.eps", "'-8/255'"]),
        (["attack.steps=0"], ["steps is 0", "at least 1"]),
        (["train.epochs=0"], ["train.epochs is 0"]),
        (["branches.clat.method.1.k=7"], ["k is 7", "6 layers", "1 to 6"]),
        (["method=[{name: pgd-at}, {name: clat, k: 9, start_epoch: 1}]"], ["k is 9", "1 to 6"]),
        (
            ["branches.clat.method.1.select=fixed", "branches.clat.method.1.layers=[layer9]"],
            ["unknown layer 'layer9'", "layer3.0.conv", "toughen list layers"],
        ),
        (["train.batch_size=61"], ["batch_size is 61", "60 images"]),
        (["data.train_samples=99999"], ["99999", "1198"]),
        (["data.name=folder:nowhere"], ["nowhere", "does not exist"]),
        (["data.name=parquet:nowhere"], ["nowhere", "does not exist"]),
        (["data.name=digitz"], ["'digitz'", "did you mean 'digits'"]),
        (["data.path=here"], ["takes no path", "'here'"]),
        (["train.device=cuda:9"], ["train.device", "'cuda:9'"]),
        (["evaluate.attacks=[pgd20]"], ["unknown attack 'pgd20'", "pgd-20"]),
        (["evaluate.attacks=[clean, clean]"], ["evaluate.attacks", "clean"]),
        (["--resum", "run", "--extra"], ["--extra"]),
        (["train.epochs"], ["'train.epochs'"]),
    ],
    ids=" ".join,
)
def test_a_bad_setting_is_refused_before_anything_is_written(refused, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    named = words if words[0].startswith("--") or "=" not in words[0] else [*DIGITS, *words]
    refused(["train", *named], *expected)
    assert list(tmp_path.iterdir()) == []


def test_a_lone_word_that_is_no_override_is_refused(refused):
    refused(["train", "digits", "epochs"], "'epochs'", "key.path=value")


def test_an_empty_data_folder_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in ("folder", "parquet", "cifar10"):
        refused(["train", f"data.name={kind}:{tmp_path / 'empty'}", "--out", tmp_path / "run"], tmp_path / "empty")
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_decoded_is_named(refused, tmp_path):
    root = image_folder(tmp_path / "images")
    (root / "dog" / "3.png").write_bytes(picture()[:40])
    refused(["train", f"data.name=folder:{root}", "data.validation=1", "--out", tmp_path / "run"], root / "dog/3.png")
    assert not (tmp_path / "run").exists()


def test_a_label_outside_the_classes_is_named(refused, tmp_path):
    root = parquet_folder(tmp_path / "images", [0, 1, 2, 1])
    refused(
        ["train", f"data.name=parquet:{root}", "data.validation=1", "--out", tmp_path / "run"],
        "label 2",
        "0..1",
    )


def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(["train", *DIGITS, "--out", out], "output folder", out, "choose another --out")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_folder_with_a_finished_run_is_refused_and_the_run_is_kept(refused, own):
    before = outcome(own)
    refused(["train", *DIGITS, "--out", own.path], own.path, "already holds a finished run")
    assert outcome(own) == before


def test_an_output_folder_with_an_unfinished_run_names_the_resume_command(refused, own):
    (own.path / "finished.json").unlink()
    before = outcome(own)
    refused(["train", *DIGITS, "--out", own.path], "already holds an unfinished run", f"--resume {own.path}")
    assert outcome(own) == before


# -- --resume, refused --------------------------------------------------------------------------------


def test_resuming_what_is_no_run_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        refused(["train", "--resume", path], path, "not a run folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_runs_is_refused_with_the_runs_in_it(refused, finished):
    runs = finished.path.parent
    refused(["compare", runs], f"{runs} is not a run folder", "give a run in it", finished.path)
    refused(["report", runs], f"{runs} is not a run folder", "give a run in it", finished.path)


def test_a_folder_of_images_is_taken_for_what_it_is(refused, tmp_path):
    (tmp_path / "images").mkdir()
    refused(["train", "digits", tmp_path / "images"], f"data.path={tmp_path / 'images'} for a folder of images")
    refused(["train", f"data.name={tmp_path / 'images'}"], f"as images of your own it is folder:{tmp_path / 'images'}")


def test_resuming_a_finished_run_points_at_compare(refused, finished):
    refused(["train", "--resume", finished.path], "is finished", f"toughen compare {finished.path}")


def test_resuming_takes_no_other_settings(refused, own):
    (own.path / "finished.json").unlink()
    refused(
        ["train", "--resume", own.path, "train.epochs=9"],
        "--resume takes everything from the run folder",
        f"change it in {own.config_file}",
    )
    refused(["train", "--resume", own.path, "--out", "elsewhere"], "--resume takes everything from the run folder")


@pytest.mark.parametrize("content", ["train: [", "- 1", "", "model: {name: small_cnn}"])
def test_resuming_a_run_with_a_damaged_recipe_is_refused(refused, own, content):
    (own.path / "finished.json").unlink()
    own.config_file.write_text(content)
    refused(["train", "--resume", own.path])


@pytest.mark.parametrize("kind", ["truncated", "of another model", "a pickle"])
def test_a_spoiled_checkpoint_is_refused_and_kept(refused, own, kind):
    (own.path / "finished.json").unlink()
    last = own.checkpoints / "last"
    if kind == "truncated":
        (last / "weights.safetensors").write_bytes((last / "weights.safetensors").read_bytes()[:500])
    elif kind == "of another model":
        own.config_file.write_text(own.config_file.read_text().replace("width: 2", "width: 3"))
    else:
        (last / "weights.safetensors").write_bytes(pickle.dumps({"weight": 1}))
    before = fingerprints(own)
    for words in (["train", "--resume", own.path], ["evaluate", own.path], ["analyze", own.path]):
        refused(words, last, "another model" if kind == "of another model" else "damaged")
    assert fingerprints(own) == before


def test_another_method_tells_of_branches_that_keep_methods_of_their_own(toughen, tmp_path):
    small = [*DIGITS, "train.epochs=2", "evaluate.attacks=[clean]", "method=[{name: trades}]"]
    said = toughen("train", *small, "--out", tmp_path / "a")
    assert "branches keep methods of their own: clat, clat-eq6; give them too" in said.err


# -- evaluate -----------------------------------------------------------------------------------------


def test_evaluating_a_run_stores_the_outcome_of_every_sample(toughen, own):
    said = toughen("evaluate", own.path, "--attacks", "clean,pgd-3", "--json", own.path / "out.json")
    assert said.status == 0
    stored = own.evaluations("last")["pgd-3"]
    assert len(stored["correct"]) == stored["n"] == 40
    assert stored["settings"]["steps"] == 3
    assert stored["settings"]["threat"]["eps"] == 0.15
    assert f"{100 * stored['accuracy']:.2f} %" in said.out
    written = json.loads((own.path / "out.json").read_text())
    assert written["pgd-3"]["correct"] == stored["correct"]
    assert toughen("compare", own.path).status == 0


def test_an_evaluation_repeats_the_figures_of_the_run(toughen, own):
    before = own.evaluations("last")["pgd-2"]
    toughen("evaluate", own.path, "--attacks", "pgd-2")
    after = own.evaluations("last")["pgd-2"]
    assert {key: after[key] for key in ("accuracy", "correct", "settings", "n")} == {
        key: before[key] for key in ("accuracy", "correct", "settings", "n")
    }


def test_what_was_measured_is_not_measured_again_unless_asked(toughen, own):
    (own.evals("last") / "pgd-2.json").unlink()
    first = toughen("evaluate", own.path, "--attacks", "pgd-2")
    assert "measured before" not in first.err
    again = toughen("evaluate", own.path, "--attacks", "pgd-2")
    assert "pgd-2: as measured before" in again.err
    assert "--again repeats it" in again.err
    assert again.out == first.out
    assert "measured before" not in toughen("evaluate", own.path, "--attacks", "pgd-2", "--again").err


def test_results_of_any_target_are_kept_where_asked(toughen, tmp_path):
    words = ["evaluate", "small_cnn", "--width", "2", "--samples", "10", "--attacks", "clean,pgd-2", "--out", tmp_path]
    assert toughen(*words).status == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.json", "pgd-2.json"]
    assert "as measured before" in toughen(*words).err
    assert "as measured before" not in toughen(*words, "--seed", "1").err


def test_an_evaluation_that_is_stopped_says_where_its_results_are(toughen, own, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PGD, "__call__", stop)
    said = toughen("evaluate", own.path, "--attacks", "clean,pgd-3", "--out", own.path / "kept")
    assert said.status == 130
    assert said.err.endswith(f"is kept in {own.path / 'kept'}; the same command goes on from there.\n")
    assert (own.path / "kept" / "clean.json").is_file()
    said = toughen("evaluate", own.path, "--attacks", "pgd-3", "--eps", "0.1")
    assert said.err.endswith(
        "Nothing is kept: measured otherwise than the run (--eps); with --out DIR the same command would go on.\n"
    )


def test_repeats_give_mean_spread_and_the_worst_case_of_each_sample(toughen, own):
    words = ["evaluate", own.path, "--attacks", "pgd-1:eps=0.3", "--repeats", "3", "--json", own.path / "out.json"]
    said = toughen(*words)
    repeats = json.loads((own.path / "out.json").read_text())["repeats"]
    found = [repeat["pgd-1:eps=0.3"] for repeat in repeats]
    assert [one["seed"] for one in found] == [0, 1, 2]
    worst = [min(column) for column in zip(*(one["correct"] for one in found), strict=True)]
    mean = sum(one["accuracy"] for one in found) / 3
    assert f"{100 * mean:.2f} (" in said.out
    assert f"{100 * sum(worst) / 40:.2f} %" in said.out


def test_a_strength_curve_is_one_evaluation_for_each_value(toughen, own):
    words = ["evaluate", own.path, "--attacks", "clean,pgd-3", "--over", "eps=0,0.1,0.3"]
    said = toughen(*words, "--plot", own.path / "curve.png", "--json", own.path / "out.json")
    found = json.loads((own.path / "out.json").read_text())
    assert list(found) == ["clean", "pgd-3:eps=0", "pgd-3:eps=0.1", "pgd-3:eps=0.3"]
    assert found["pgd-3:eps=0"]["correct"] == found["clean"]["correct"]
    assert found["pgd-3:eps=0.3"]["accuracy"] <= found["pgd-3:eps=0.1"]["accuracy"] <= found["clean"]["accuracy"]
    with Image.open(own.path / "curve.png") as drawn:
        assert drawn.format == "PNG"
    assert said.out.count("pgd-3:eps") == 3
    assert set(own.evaluations("last")) == {"clean", "pgd-2"}  # a curve is no result of the run's own


def test_accuracies_of_each_class_are_shown_on_request(toughen, own):
    said = toughen("evaluate", own.path, "--attacks", "clean", "--per-class")
    stored = own.evaluations("last")["clean"]
    one = stored["label"][0]
    found = [right for right, label in zip(stored["correct"], stored["label"], strict=True) if label == one]
    assert re.search(rf"{one} +\W+ +{len(found)} +\W+ +{100 * sum(found) / len(found):.1f}", said.out)


def test_flags_of_sanity_checks_are_printed_and_stored(toughen, own):
    said = toughen("evaluate", own.path, "--attacks", "pgd-2", "--again")
    flags = own.evaluations("last")["pgd-2"]["flags"]
    assert ("sanity checks: nothing seen" in said.out) == (not flags)
    for flag in flags:
        assert flag["check"] in said.out


def test_without_an_eps_nothing_is_said_to_have_been_checked(toughen, own):
    before = own.evaluations("last")
    said = toughen("evaluate", own.branch("clat").path, "--attacks", "clean", "--seed", "5")
    assert "sanity checks: none made" in said.out
    toughen("evaluate", own.path, "--attacks", "clean")
    assert own.evaluations("last") == before  # with the flags that were seen under attack


def test_what_the_run_itself_measured_is_not_measured_again(toughen, own):
    before = own.evaluations("last")
    assert "clean, pgd-2: as measured before" in toughen("evaluate", own.path, "--attacks", "clean,pgd-2").err
    assert own.evaluations("last") == before


def test_every_target_attacks_every_other_one(toughen, refused, own, tmp_path):
    branches = [own.branch("pgd-at").path, own.branch("clat").path]
    said = toughen(
        "transfer", *branches, "--attacks", "pgd-2", "--json", tmp_path / "t.json", "--plot", tmp_path / "t.png"
    )
    assert said.status == 0
    found = json.loads((tmp_path / "t.json").read_text())["pgd-2"]
    assert (found["names"], found["n"]) == (["pgd-at", "clat"], 40)
    for row in found["accuracy"]:
        for value in row:
            assert f"{100 * value:.1f}" in said.out
    with Image.open(tmp_path / "t.png") as drawn:
        assert drawn.format == "PNG"
    refused(["transfer", branches[0], branches[0]], "named twice")
    refused(["transfer", *branches, "--attacks", "clean"], "an attack other than clean")
    refused(["transfer", branches[0], "small_cnn"], "small_cnn", "different t")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--plot", "a.png"], "say over what with --over"),
        (["--over", "eps"], "--over is 'eps'; write KEY=VALUE"),
        (["--over", "keep=last,worst", "--plot", "a.png"], "--over has 'last'; leave --plot out"),
        (["--eps", "1e999"], "'1e999' is not a number or a fraction"),
        (["--out", __file__], f"can't write into {__file__}: a file is in its place; give a folder with --out"),
        (["--out", f"{__file__}/a"], f"can't write into {__file__}/a: a file is in its place"),
        (["--attacks", "clean,pgd-0"], "attack 'pgd-0': steps are 0; write 1 to 99999"),
        (["--over", "eps=1", "--attacks", "clean"], "--attacks names none but clean"),
        (["--attacks", "pgd-2:steps=x"], "pgd-2:steps=x"),
        (["--attacks", "standard:queries=3"], "'standard' is a fixed suite"),
    ],
)
def test_wrong_options_of_an_evaluation_are_refused(refused, words, expected):
    refused(["evaluate", "small_cnn", "--samples", "5", *words], expected)


def test_an_option_that_a_verb_does_not_have_is_told_with_those_that_it_has(refused):
    said = "unknown option of `toughen reproduce`: '--sed'; did you mean '--seeds'? Allowed: --address, --checkpoint"
    refused(["reproduce", "5", "--sed", "3"], said)
    refused(["train", "digits", "--ot=x"], "unknown option of `toughen train`: '--ot'; did you mean '--out'?")


EACH_ITS_OWN_FOLDER = """
import os, sys
from toughen.cli import main

folder, *words = sys.argv[1:]
sys.exit(main([*words, "--out", f"{folder}/{os.environ['RANK']}"]))
"""


def test_two_processes_find_what_one_finds(toughen, own, tmp_path):
    """Each attacks every other batch; only the first has a folder with what was measured before."""
    attacks = ["--attacks", "pgd-1,pgd-3:restarts=2", "--batch-size", "7"]
    words = ["evaluate", own.path, *attacks, "--json"]
    assert toughen(*words, tmp_path / "one.json", "--out", tmp_path / "0").status == 0
    (tmp_path / "0" / "pgd-3_restarts=2.json").unlink()
    (tmp_path / "each.py").write_text(EACH_ITS_OWN_FOLDER)
    launch = ["--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, tmp_path / "each.py", tmp_path, *words]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "two.json")], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sanity") == 1
    assert done.stderr.count("note: pgd-1: as measured before") == 1
    assert not (tmp_path / "1").exists()
    one, two = (timeless(json.loads((tmp_path / name).read_text())) for name in ("one.json", "two.json"))
    assert one == two


def test_a_mistake_is_told_by_one_of_several_processes(toughen, refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert toughen("evaluate", "nosuch") == Said(2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused(["evaluate", "nosuch"], "nosuch")


def test_the_best_checkpoint_is_evaluated_on_request(toughen, own):
    assert toughen("evaluate", own.path, "--attacks", "pgd-3", "--checkpoint", "best").status == 0
    assert "pgd-3" in own.evaluations("best")
    assert "pgd-3" not in own.evaluations("last")


@pytest.mark.parametrize(
    "changed",
    [["--samples", "5"], ["--eps", "0.4"], ["--step-size", "0.001"], ["--norm", "l2"], ["--data", "digits"]],
    ids=lambda words: words[0],
)
def test_an_evaluation_under_other_conditions_replaces_nothing_in_the_run(toughen, own, changed):
    before = own.evaluations("last")
    words = ["evaluate", own.path, "--attacks", "clean,pgd-2", *changed]
    said = toughen(*words)
    assert said.status == 0
    assert own.evaluations("last") == before
    told = f"note: not kept in the run: measured otherwise than the run ({changed[0]}); give --out DIR to"
    assert f"{told} keep results and to go on after a stop\n" in said.err
    assert "not kept" not in toughen(*words, "--out", own.path / "kept").err


def test_what_is_written_as_json_only_is_said_not_to_go_on_after_a_stop(toughen, own):
    words = ["evaluate", own.path, "--attacks", "clean", "--samples", "5", "--seed", "1"]
    said = toughen(*words, "--json", own.path / "out.json")
    assert "run (--samples, --seed); give --out DIR to go on after a stop\n" in said.err


def test_a_mixture_is_no_result_of_the_run(toughen, own):
    before = own.evaluations("last")
    mixture = ["--accurate", own.branch("clat").path, "--alpha", "0.5"]
    said = toughen("evaluate", own.path, "--attacks", "clean,pgd-2", *mixture)
    assert said.status == 0
    assert "not kept in the run: measured otherwise than the run (--accurate)" in said.err
    assert own.evaluations("last") == before


def test_nothing_is_said_of_what_is_kept_in_the_run(toughen, own):
    assert "not kept" not in toughen("evaluate", own.path, "--attacks", "clean", "--per-class").err


def test_a_file_of_weights_is_evaluated_as_the_model_that_is_named(toughen, refused, own):
    weights = own.checkpoints / "last" / "weights.safetensors"
    named = ["--model", "small_cnn", "--width", "2"]
    said = toughen("evaluate", weights, *named, "--attacks", "clean", "--json", own.path / "out.json")
    assert said.status == 0
    assert len(json.loads((own.path / "out.json").read_text())["clean"]["correct"]) == 599
    refused(["evaluate", weights], "is a file of weights", weights, "--model")
    refused(
        ["evaluate", own.config_file], own.config_file, "give a run folder, a weights file with --model, or a model"
    )
    refused(["evaluate", weights, "--model", "small_cnn"], weights, "belongs to another model")


def test_the_checkpoint_of_a_training_script_is_evaluated(toughen, tmp_path):
    model = models.create("small_cnn", in_channels=1, seed=3)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7, "best": np.float64(0.5)}, tmp_path / "weights.pth")
    said = toughen("evaluate", tmp_path / "weights.pth", "--model", "small_cnn", "--attacks", "clean")
    assert said.status == 0
    assert "holds its own normalisation" in said.err


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_file_of_weights_that_would_run_code_is_refused(refused, tmp_path):
    torch.save({"state_dict": {}, "extra": Trap(tmp_path / "sprung")}, tmp_path / "weights.pt")
    refused(["evaluate", tmp_path / "weights.pt", "--model", "small_cnn"], tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("verb", ["evaluate", "analyze"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resnet81"], ["unknown model 'resnet81'", "did you mean 'resnet18'"]),
        (["torchvision/rsnet18"], ["rsnet18", "did you mean 'resnet18'"]),
        (["nosuch"], ["no run folder and no weights file nosuch", "unknown model 'nosuch'"]),
        (["gone/run"], ["gone/run is neither a run folder, nor a weights file, nor a model"]),
        (["gone.safetensors"], ["gone.safetensors is neither a run folder, nor a weights file, nor a model"]),
        (["small_cnn", "--eps", "-1"], ["eps is -1"]),
        (["small_cnn", "--eps", "8/0"], ["'8/0' is not a number"]),
        (["small_cnn", "--eps", "much"], ["'much' is not a number"]),
        (["small_cnn", "--step-size", "-0.1"], ["step_size is -0.1"]),
        (["small_cnn", "--width", "0"], ["width is 0"]),
        (["small_cnn", "--width", "wide"], ["--width", "'wide'"]),
        (["small_cnn", "--data", "digit"], ["unknown data set 'digit'", "did you mean 'digits'"]),
        (["small_cnn", "--data", "folder:gone"], ["gone", "does not exist"]),
        (["small_cnn", "--data", "parquet:gone"], ["gone", "does not exist"]),
        (["small_cnn", "--image-size", "0"], ["image_size is 0"]),
        (["small_cnn", "--norm", "l1"], ["--norm", "'l1'", "linf"]),
        (["small_cnn", "--samples", "0"], ["--samples is 0", "must be 1 to"]),
        (["small_cnn", "--samples", "99999"], ["--samples is 99999", "must be 1 to"]),
        ([], ["TARGET"]),
    ],
    ids=" ".join,
)
def test_a_bad_target_or_option_is_refused(refused, tmp_path, monkeypatch, verb, words, expected):
    monkeypatch.chdir(tmp_path)
    refused([verb, *words], *expected)


def test_bad_options_of_one_verb_are_refused(refused, tmp_path):
    refused(["analyze", "small_cnn", "--steps", "0"], "steps is 0")
    refused(["evaluate", "small_cnn", "--attacks", "clean,pgd20"], "unknown attack 'pgd20'")
    refused(["evaluate", "small_cnn", "--attacks", "clean,clean"], "'clean' is named twice")
    refused(["evaluate", "small_cnn", "--batch-size", "0"], "batch_size is 0")
    refused(["bake"], "'bake'", "train")
    refused([], "VERB")


def test_a_folder_that_is_no_run_is_refused_as_a_target(refused, tmp_path):
    refused(["evaluate", tmp_path], tmp_path, "not a run folder")


def test_results_that_cannot_be_written_are_said(toughen, tmp_path):
    for words in (
        ["analyze", "small_cnn", "--width", "2", "--samples", "5", "--json", tmp_path / "gone" / "report.json"],
        ["analyze", "small_cnn", "--width", "2", "--samples", "5", "--plot", tmp_path / "gone" / "report.png"],
        ["analyze", "small_cnn", "--width", "2", "--samples", "5", "--plot", tmp_path / "report.wav"],
        ["evaluate", "small_cnn", "--width", "2", "--samples", "5", "--json", tmp_path / "gone" / "report.json"],
    ):
        said = toughen(*words)
        assert said.status == 2
        assert str(words[-1]) in said.err
        assert "Traceback" not in said.err


# -- analyze ------------------------------------------------------------------------------------------


def test_analyze_prints_and_writes_the_criticality_of_each_layer(toughen, tmp_path):
    files = ["--json", tmp_path / "report.json", "--plot", tmp_path / "report.png"]
    said = toughen("analyze", "small_cnn", "--width", "4", "--samples", "20", "--steps", "3", *files)
    assert said.status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["index"] for row in report["layers"]] == list(range(7))
    for row in report["layers"]:
        assert re.search(rf"{re.escape(row['name'])} .*{row['criticality']:.4g}", said.out)
    with Image.open(tmp_path / "report.png") as drawn:
        assert drawn.format == "PNG"


def assert_twenty_convolutions(said: Said, file: Path) -> None:
    assert said.status == 0
    report = json.loads(file.read_text())
    convolutions = [row for row in report["layers"] if not row["classifier"]]
    assert [row["index"] for row in convolutions] == list(range(20))
    assert [row["name"] for row in report["layers"] if row["classifier"]] == ["linear"]
    assert all(re.search(rf"^\W*{index} .*conv|shortcut", said.out, flags=re.MULTILINE) for index in range(20))
    assert re.search(r"^\W*cls .*linear", said.out, flags=re.MULTILINE)


def test_analyze_lists_the_20_convolutions_of_resnet18_and_the_classifier_apart(toughen, tmp_path):
    small = ["--width", "4", "--samples", "5", "--steps", "2"]
    said = toughen("analyze", "resnet18", *small, "--json", tmp_path / "report.json")
    assert_twenty_convolutions(said, tmp_path / "report.json")


@pytest.mark.cifar10
def test_analyze_reads_real_images_from_parquet_files(toughen, tmp_path, cifar10_path):
    root = tmp_path / "images"
    root.mkdir()
    for part in ("train", "test"):  # decoding all 60,000 takes half a minute
        [file, *_] = sorted(cifar10_path.glob(f"{part}-*.parquet"))
        pq.write_table(pq.read_table(file).slice(0, 60), root / f"{part}-0.parquet")
    small = ["--width", "4", "--samples", "5", "--steps", "2", "--data", f"parquet:{root}"]
    said = toughen("analyze", "resnet18", *small, "--json", tmp_path / "report.json")
    assert_twenty_convolutions(said, tmp_path / "report.json")


def test_analyze_takes_a_run_with_its_own_threat_and_data(toughen, own):
    said = toughen("analyze", own.path, "--samples", "20", "--json", own.path / "report.json")
    assert said.status == 0
    assert "0.15" in json.dumps(json.loads((own.path / "report.json").read_text())["settings"])


# -- compare and list ---------------------------------------------------------------------------------


def test_compare_puts_runs_and_their_branches_side_by_side(toughen, finished, own):
    said = toughen("compare", finished.path, own.path)
    assert said.status == 0
    names = ["run", "run/pgd-at", "run/clat", "own", "own/pgd-at", "own/clat"]
    assert all(re.search(rf"^\W*{name} ", said.out, flags=re.MULTILINE) for name in names)


def test_compare_refuses_what_is_no_run_and_runs_without_results(refused, own):
    refused(["compare", own.path.parent / "gone"], "gone is not a run folder")
    shutil.rmtree(own.path / "evals")
    refused(["compare", own.path], "no evaluation", f"toughen evaluate {own.path}")
    (own.path / "finished.json").unlink()
    refused(["compare", own.path], "no evaluation yet", f"toughen train --resume {own.path}")
    refused(["compare"], "RUN")


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("models", ["small_cnn", "resnet18", "preact_resnet18"]),
        ("datasets", ["digits", "cifar10", "folder", "parquet"]),
        ("methods", ["clean", "pgd-at", "clat"]),
        ("attacks", ["pgd", "clean", "fgsm", "pgd-20"]),
        ("selectors", ["top", "bottom", "random", "fixed", "shape_only"]),
        ("recipes", ["digits", "cifar10_smoke", "cifar10_tiny", "cifar10_resnet18_pgdat_clat"]),
    ],
)
def test_list_names_what_there_is(toughen, what, some):
    said = toughen("list", what)
    assert said.status == 0
    assert set(some) <= {line.split()[0] for line in said.out.splitlines()}
    assert said.err == ""


def test_list_layers_shows_the_layers_of_a_model(toughen):
    said = toughen("list", "layers", "resnet18", "--width", "4")
    assert said.status == 0
    assert len(re.findall(r"^\W*\d+ .*(?:conv|shortcut)", said.out, flags=re.MULTILINE)) == 20
    assert len(re.findall(r"^\W*classifier .*linear", said.out, flags=re.MULTILINE)) == 1


def test_random_weights_are_noted_beside_the_results(toughen, finished):
    small = ["small_cnn", "--width", "2", "--samples", "5"]
    for words in (["analyze", *small], ["evaluate", *small, "--attacks", "clean"]):
        assert "small_cnn has random weights" in toughen(*words).err
    assert "random" not in toughen("evaluate", finished.path, "--samples", "5", "--attacks", "clean").err


def test_list_refuses_what_it_does_not_know(refused):
    refused(["list", "layers"], "toughen list layers MODEL")
    refused(["list", "layers", "resnet81"], "did you mean 'resnet18'")
    refused(["list", "colours"], "'colours'", "models")


# -- from Python --------------------------------------------------------------------------------------


def test_pixels_that_are_no_numbers_are_refused_by_evaluate_and_analyze():
    model, attack = models.create("small_cnn", in_channels=1, width=2), PGD(ThreatModel(eps=0.1), step_size=0.05)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    x[1, 0, 2, 3] = float("nan")
    clean = parse_attack("clean", threat=attack.threat, step_size=0.05)
    for call in (lambda: evaluate(model, [(x, y)], [clean]), lambda: analyze(model, [(x, y)], attack)):
        with pytest.raises(InputError, match="image 1 of a batch has NaN or infinite pixels"):
            call()


def test_the_sets_of_a_recipe_do_not_overlap():
    splits = data.load(recipe(data={"train_samples": 200}).data)
    keys = [{image.numpy().tobytes() for image in part.images} for part in (splits.train, splits.validation)]
    assert len(keys[0] & keys[1]) <= 2  # two scans may be alike, twenty may not


def test_a_dry_run_finds_what_the_run_would_stumble_over(refused):
    refused(["train", "digits", "--dry-run", "method.0={name: clat, k: 50}"], "k is 50", "1 to 6")
    refused(["train", "digits", "--dry-run", "train.batch_size=5000"], "batch_size is 5000")
    refused(["train", "digits", "--dry-run", "threat.eps=8"], "eps is 8", "did you mean 8/255?")


def test_a_file_that_could_not_be_written_is_refused_before_the_work(refused, tmp_path):
    refused(["analyze", "small_cnn", "--plot", str(tmp_path / "plot.jpgg")], "plot.jpgg", ".png, .pdf, .svg")
    refused(["evaluate", "small_cnn", "--json", str(tmp_path / "gone" / "a.json")], "there is no folder")


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m toughen list recipes | true"  # gone before the first line comes
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
