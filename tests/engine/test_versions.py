"""States of other versions, and of other runs."""

import base64
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small_runs import resume
from toughen.engine import checkpoint
from toughen.engine.versions import FORMAT, check_optimizer, check_state, migrated
from toughen.errors import InputError

# a run after the first of two epochs, as format 2 wrote it
STORED = json.loads((Path(__file__).parent / "run_of_format_2.json").read_text())


def stored_run(folder: Path) -> Path:
    for name, content in STORED.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("checkpoints"):
            file.write_bytes(lzma.decompress(base64.b64decode(content)))
        else:
            file.write_text(content)
    for part in ("criticality", "evals"):
        (folder / part).mkdir()
    (folder / "provenance.json").write_text("{}\n")
    return folder


def changed(folder: Path, **entries: Any) -> Path:
    """A stored run with another state."""
    last = stored_run(folder) / "checkpoints" / "last"
    state = torch.load(last / "state.pt", weights_only=True)
    torch.save({**state, **entries}, last / "state.pt")
    (last / "sha256").write_text(checkpoint._sums(last))
    return last


def test_a_run_of_format_2_is_resumed_and_written_in_the_present_format(tmp_path):
    before = checkpoint.read_state(stored_run(tmp_path / "run") / "checkpoints" / "last")
    assert (before["format"], before["epoch"], before["sums"]) == (FORMAT, 1, {})

    run = resume(tmp_path / "run")

    assert [row["epoch"] for row in run.log()] == [1, 2]
    assert torch.load(run.checkpoints / "last" / "state.pt", weights_only=True)["format"] == FORMAT
    assert run.evaluations("last")["clean"]["epoch"] == 2


def test_a_middle_of_an_epoch_of_format_2_that_lacks_what_is_counted_now_is_evaluated_and_not_trained_on(tmp_path):
    last = changed(tmp_path, step=1, sums={"loss": torch.zeros(())})
    assert checkpoint.read_state(last)["step"] == 1
    with pytest.raises(InputError, match=r"middle of an epoch by an older toughen \(format 2, not 3\); finish that"):
        checkpoint.load_training(last, nn.Linear(2, 2))


def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path):
    last = changed(tmp_path, format=4)
    last.with_name("last.old").mkdir()
    with pytest.raises(InputError, match=r"written by a newer toughen \(format 4, not 3\); update$"):
        checkpoint.read_state(last)


def test_a_format_too_old_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"written by an older toughen \(format 1, not 3\).*provenance\.json"):
        checkpoint.read_state(changed(tmp_path, format=1))


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"epoch": 1}, "it lacks live, step;"),
        ({"epoch": 1, "step": 0, "live": {}, "more": 1}, "it also holds more;"),
        ({"epoch": 1, "step": 0, "lives": {}}, "it lacks live; it also holds lives;"),
    ],
)
def test_a_state_with_other_entries_names_them(state, told):
    with pytest.raises(InputError, match=rf"runs/a was written by another version of toughen: {told} go on with"):
        check_state({"format": FORMAT, **state}, {"epoch", "step", "live"}, folder=Path("runs/a"))


def test_a_state_with_its_entries_passes():
    check_state({"format": FORMAT, "epoch": 1}, {"epoch"}, folder=Path("runs/a"))


# -- optimizers -----------------------------------------------------------------------------------

NAMES = ["weight", "bias"]


def optimizer(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, size: int = 2, lr: float = 0.1) -> Any:
    model = nn.Linear(size, size)
    made = kind(model.parameters(), lr=lr)  # type: ignore[call-arg]
    model(torch.ones(1, size)).sum().backward()
    made.step()
    return made


def test_the_state_of_the_same_parameters_passes():
    check_optimizer(optimizer(lr=0.5), optimizer().state_dict(), NAMES, NAMES, folder=Path("last"))


@pytest.mark.parametrize(
    ("source", "names", "told"),
    [
        (optimizer(), ["weight", "scale"], "is of other parameters: bias, scale;"),
        (optimizer(), ["bias", "weight"], "is of parameters in another order;"),
        (optimizer(size=3), NAMES, r"does not fit: exp_avg of weight is \[3, 3\] there and \[2, 2\] here;"),
        (optimizer(torch.optim.SGD), NAMES, "is of another kind of optimizer;"),
    ],
    ids=["names", "order", "shapes", "kind"],
)
def test_the_state_of_other_parameters_is_refused(source, names, told):
    with pytest.raises(InputError, match=told):
        check_optimizer(optimizer(), source.state_dict(), names, NAMES, folder=Path("last"))


def test_training_weights_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"another model: 'weight' is \[3, 3\] there and \[2, 2\] here"):
        checkpoint.take_training({"training": nn.Linear(3, 3).state_dict()}, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({}, "it lacks epoch"),
        ({"epoch": [1]}, "epoch is a list"),
        ({"epoch": 1, "training": 2}, "training is a int"),
        ({"epoch": 1, "step": 1, "sums": 3}, "sums is a int"),
    ],
)
@pytest.mark.parametrize("number", [2, FORMAT])
def test_a_state_that_toughen_did_not_write_is_refused(state: dict[str, object], fault: str, number: int) -> None:
    with pytest.raises(InputError, match=f"^checkpoint a was not written by toughen: {fault}$"):
        migrated({"format": number, **state}, folder=Path("a"))


@pytest.mark.parametrize("entries", [{"best": "x"}, {"live": {}}, {"log": [1]}, {"seconds": "x"}])
def test_a_state_whose_parts_are_of_other_kinds_is_refused_in_one_line(tmp_path, entries):
    changed(tmp_path / "run", **entries)
    with pytest.raises(InputError, match=r"checkpoint .*last") as told:
        resume(tmp_path / "run")
    assert len(str(told.value).splitlines()) == 1
