import random
from pathlib import Path

import pytest
import torch
from torch import nn

from as_found import same
from toughen.engine import checkpoint
from toughen.errors import InputError


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
    state = {"sums": {"loss": torch.randn(3)}, "nested": [1, (2.5, "x", None)]}

    checkpoint.save(tmp_path / "last", model, state)
    found = checkpoint.load(tmp_path / "last", again)

    assert all(same(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert same(found["sums"]["loss"], state["sums"]["loss"])
    assert found["nested"] == [1, (2.5, "x", None)]


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path):
    folder = saved(tmp_path / "last", 1)
    saved(folder, 2)
    assert loaded_fill(folder) == (2.0, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("renames", "expected"), [(0, 1), (1, 1), (2, 2)])
def test_a_kill_around_the_renames_leaves_one_whole_checkpoint(tmp_path, monkeypatch, renames, expected):
    folder = saved(tmp_path / "last", 1)
    rename, rmtree, done = Path.rename, checkpoint.shutil.rmtree, 0

    def counting(self: Path, target: Path) -> Path:
        nonlocal done
        if done == renames:
            raise KilledError
        done += 1
        return rename(self, target)

    def clearing(path: Path, ignore_errors: bool = False) -> None:
        if done == renames == 2:
            raise KilledError
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counting)
        patch.setattr(checkpoint.shutil, "rmtree", clearing)
        with pytest.raises(KilledError):
            saved(folder, 2)

    assert folder.exists() == (renames != 1), "the case between the renames must be among these"
    assert checkpoint.exists(folder)
    assert loaded_fill(folder) == (float(expected), expected)
    saved(folder, 3)
    assert loaded_fill(folder) == (3.0, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    folder = saved(tmp_path / "last", 1)

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KilledError):
            saved(folder, 2)

    assert loaded_fill(folder) == (1.0, 1)


FILES = ("weights.safetensors", "state.pt")


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
    with pytest.raises(InputError, match=r"is damaged|no checkpoint in"):
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
    torch.save({"format": 2, "epoch": Bomb(victim)}, folder / "state.pt")
    (folder / "sha256").write_text(checkpoint._sums(folder))  # an attacker can count too
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load(folder, network())
    assert not victim.exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    folder = tmp_path / "last"
    checkpoint.save(folder, network(), {"format": 99})
    with pytest.raises(InputError, match="not of format 2"):
        checkpoint.load(folder, network())
