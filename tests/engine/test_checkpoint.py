import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from as_found import same
from toughen.engine import checkpoint
from toughen.errors import InputError, Notice


def network(fill: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(fill)
    return model


def saved(folder: Path, fill: float = 1.0) -> Path:
    checkpoint.save(folder, network(fill), {"epoch": int(fill), "momentum": {"0": torch.full((50,), fill)}})
    return folder


def loaded_fill(folder: Path) -> tuple[float, int]:
    """What is loaded: the value that fills the weights, and the epoch of the state."""
    model = network()
    state = checkpoint.load(folder, model)
    values = {float(value.float().mean()) for value in model.state_dict().values()}
    assert len(values) == 1
    return values.pop(), state["epoch"]


def test_weights_buffers_and_state_come_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model, again = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), network()
    model.to(memory_format=torch.channels_last)
    state = {"epoch": 1, "sums": {"loss": torch.randn(3)}, "nested": [1, (2.5, "x", None)]}

    checkpoint.save(tmp_path / "last", model, state)
    found = checkpoint.load(tmp_path / "last", again)

    assert all(same(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert same(found["sums"]["loss"], state["sums"]["loss"])
    assert found["nested"] == [1, (2.5, "x", None)]


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path):
    folder = saved(tmp_path / "last", 1)
    saved(folder, 2)
    assert loaded_fill(folder) == (2.0, 2)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_last_two_are_kept_and_no_more(tmp_path):
    for fill in range(5):
        folder = saved(tmp_path / "last", fill)
    assert names(tmp_path) == ["last", "last.old"]
    assert loaded_fill(tmp_path / "last") == (4.0, 4)
    assert loaded_fill(tmp_path / "last.old") == (3.0, 3)
    assert names(folder) == names(tmp_path / "last.old") == ["sha256", "state.pt", "weights.safetensors"]


def test_a_repeated_epoch_does_not_push_out_the_one_before_it(tmp_path):
    for fill in (1, 2, 2):
        saved(tmp_path / "last", fill)
    assert loaded_fill(tmp_path / "last") == (2.0, 2)
    assert loaded_fill(tmp_path / "last.old") == (1.0, 1)


def test_a_damaged_checkpoint_does_not_push_out_the_whole_one_before_it(tmp_path):
    for fill in (1, 2):
        saved(tmp_path / "last", fill)
    flip(tmp_path / "last" / "state.pt", 99)
    saved(tmp_path / "last", 3)
    assert loaded_fill(tmp_path / "last") == (3.0, 3)
    assert loaded_fill(tmp_path / "last.old") == (1.0, 1)


def test_whoever_may_read_the_state_may_read_the_weights(tmp_path):
    folder = saved(tmp_path / "last")
    assert len({(folder / file).stat().st_mode for file in FILES}) == 1


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(bytes(content))


FILES = ("weights.safetensors", "state.pt")


@pytest.mark.parametrize("file", [*FILES, "sha256"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_the_checkpoint_before_is_used_where_the_newest_is_damaged_and_one_line_says_so(tmp_path, file, harm):
    for fill in (1, 2):
        folder = saved(tmp_path / "last", fill)
    victim = folder / file
    if harm == "flipped":
        flip(victim, 70)
    elif harm == "truncated":
        victim.write_bytes(victim.read_bytes()[:70])
    else:
        victim.unlink()
    with pytest.warns(Notice, match=r"last is damaged: .* the one before it is used \(epoch 1\)$") as told:
        assert loaded_fill(folder) == (1.0, 1), "weights and state of one checkpoint"
    assert len(told) == 1


def test_a_kill_between_two_renames_is_told_as_what_it_is(tmp_path):
    for fill in (1, 2):
        folder = saved(tmp_path / "last", fill)
    shutil.rmtree(folder)
    with pytest.warns(Notice, match=r"last is missing; the one before it is used \(epoch 1\)$"):
        assert loaded_fill(folder) == (1.0, 1)


def test_two_damaged_checkpoints_are_refused_in_one_line_and_the_model_stays_as_it_is(tmp_path):
    for fill in (1, 2):
        folder = saved(tmp_path / "last", fill)
    flip(folder / "state.pt", 70)
    (tmp_path / "last.old" / "weights.safetensors").unlink()
    model = network(7)
    assert checkpoint.exists(folder), "or a resume would begin anew, over what may be repaired"
    with pytest.raises(
        InputError, match=r"last is damaged: state\.pt is not .*last\.old is damaged: weights.* is missing; there is no"
    ):
        checkpoint.load(folder, model)
    assert all(bool((value == 7).all()) for value in model.state_dict().values())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_once_more(tmp_path, monkeypatch):
    for fill in (1, 2):
        folder = saved(tmp_path / "last", fill)
    restore = checkpoint.restore_weights
    replaced = []

    def slow(model: nn.Module, file: Path) -> None:
        if not replaced:
            replaced.append(saved(folder, 3))
        restore(model, file)

    monkeypatch.setattr(checkpoint, "restore_weights", slow)
    assert loaded_fill(folder) == (3.0, 3)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, file, share):
    folder = saved(tmp_path / "last")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"last.* is damaged"):
        checkpoint.load(folder, network())


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_refused_and_the_model_stays_as_it_is(tmp_path, file):
    folder, model = saved(tmp_path / "last"), network(7)
    content = (folder / file).read_bytes()
    draw = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(bytes(damaged))
        with pytest.raises(InputError, match="is damaged"):
            checkpoint.load(folder, model)
    assert all(bool((value == 7).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused(tmp_path, file):
    folder = saved(tmp_path / "last")
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"is damaged: {file} is missing"):
        checkpoint.load(folder, network())


def test_no_checkpoint_at_all_is_said(tmp_path):
    assert not checkpoint.exists(tmp_path / "last")
    with pytest.raises(InputError, match=r"no checkpoint in .*last"):
        checkpoint.load(tmp_path / "last", network())


def test_a_checkpoint_of_another_model_names_the_first_tensor_that_does_not_fit(tmp_path):
    folder = saved(tmp_path / "last")
    with pytest.raises(
        InputError, match=r"belongs to another model: .*'0\.weight' is \[2, 1, 3, 3\] in the file and \[4"
    ):
        checkpoint.load(folder, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(2)))
    with pytest.raises(InputError, match=r"belongs to another model: .*5 "):
        checkpoint.load(folder, nn.Sequential(nn.Conv2d(1, 2, 3)))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_a_pickle_in_the_place_of_the_state_is_refused_and_not_run(tmp_path):
    folder, victim = saved(tmp_path / "last"), tmp_path / "victim"
    torch.save({"format": 3, "epoch": Bomb(victim)}, folder / "state.pt")
    (folder / "sha256").write_text(checkpoint._sums(folder))  # an attacker can count too
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load(folder, network())
    assert not victim.exists()
