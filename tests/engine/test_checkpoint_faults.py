"""Kills, full disks and vanished folders at every moment of a save."""

import errno
import io
import os
import resource
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from toughen.engine import checkpoint
from toughen.errors import InputError, Notice

CALLS = [
    *((os, name) for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")),
    (io, "open"),
    (torch, "save"),
    (checkpoint, "save_file"),
]


class KilledError(BaseException):
    """Stands for the end of the process."""


def network(fill: float = 0.0) -> nn.Module:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, fill)
    nn.init.constant_(model.bias, fill)
    return model


def save(folder: Path, fill: int) -> None:
    checkpoint.save(folder, network(fill), {"epoch": fill, "step": 0, "momentum": torch.full((5,), float(fill))})


def loaded(folder: Path) -> int:
    """The number that fills weights and state, which must be of one checkpoint."""
    model = network(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        state = checkpoint.load(folder, model)
    assert {float(value) for value in model.state_dict()["weight"].flatten()} == {float(state["epoch"])}
    assert state["momentum"].tolist() == [float(state["epoch"])] * 5
    return int(state["epoch"])


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, work: Callable[[], None]) -> bool:
    """Do some work of which the call to the system with this number fails; whether there was one."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise error
            return call(*arguments, **settings)

        return count

    with monkeypatch.context() as patch:
        for place, name in CALLS:
            patch.setattr(place, name, counted(getattr(place, name)))
        work()
    return calls > at


@pytest.mark.parametrize("before", [0, 2])
def test_a_kill_at_any_call_to_the_system_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, monkeypatch, before):
    seen = set()
    for at in range(200):
        folder = tmp_path / str(at) / "last"
        folder.parent.mkdir()
        for fill in range(before):
            save(folder, fill)
        try:
            if not interrupted(monkeypatch, at, KilledError(), lambda folder=folder: save(folder, before)):
                break
        except KilledError:
            pass
        if before or checkpoint.exists(folder):
            seen.add(loaded(folder))
        save(folder, before + 1)
        assert loaded(folder) == before + 1
        assert {entry.name for entry in folder.parent.iterdir()} <= {"last", "last.old"}
    assert at > 10
    assert seen == {before, before - 1} - {-1}


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (errno.EROFS, errno.EIO, errno.ESTALE)]


@pytest.mark.parametrize("number", [errno.ENOSPC, *SLOW])
def test_an_error_of_the_system_at_any_call_is_one_line_and_what_was_there_is_intact(tmp_path, monkeypatch, number):
    refused = []
    for at in range(200):
        folder = tmp_path / str(at) / "last"
        folder.parent.mkdir()
        for fill in (0, 1):
            save(folder, fill)
        error = OSError(number, os.strerror(number))
        try:
            if not interrupted(monkeypatch, at, error, lambda folder=folder: save(folder, 2)):
                break
        except InputError as told:
            refused.append(str(told))
            assert not (folder.parent / "last.tmp").exists()
        assert loaded(folder) in (1, 2)
        save(folder, 3)
        assert loaded(folder) == 3
    assert len(refused) > 8
    for line in refused:
        assert f"last: {os.strerror(number)}; the checkpoint from before (epoch " in line
        assert "is intact; " in line
        assert "\n" not in line


def test_a_parent_that_vanished_is_not_made_anew(tmp_path):
    with pytest.raises(InputError, match=r"can't write .*last: No such file or directory; is its disk or mount still"):
        save(tmp_path / "gone" / "last", 1)
    assert not (tmp_path / "gone").exists()


def test_a_file_that_grows_beyond_the_limit_of_the_system_is_one_line(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for model, state in ((nn.Linear(100, 100), 0), (nn.Linear(2, 2), torch.zeros(10_000))):
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        try:
            with pytest.raises(InputError) as told:
                checkpoint.save(folder, model, {"epoch": 2, "momentum": state})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(told.value) == (
            f"can't write {folder}: File too large; the checkpoint from before (epoch 1), {folder},"
            " is intact; raise the limit of file sizes (ulimit -f)"
        )
        assert loaded(folder) == 1
        assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_runs_full_at_any_byte_leaves_the_checkpoint_from_before(tiny_disk):
    folder, refused = tiny_disk / "last", []
    save(folder, 0)
    save(folder, 1)
    for room in range(0, 120, 4):  # KiB that are left
        filler = tiny_disk / "filler"
        filler.write_bytes(b"")
        free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - room * 1024)))
        state = {"epoch": 2, "momentum": torch.zeros(8_000)}
        try:
            checkpoint.save(folder, nn.Linear(60, 60), state)
            break
        except InputError as error:
            refused.append(str(error))
        assert loaded(folder) == 1
        assert not (tiny_disk / "last.tmp").exists()
    assert len(refused) > 10
    for line in refused:
        assert "No space left on device; the checkpoint from before (epoch 1)" in line
        assert "is intact; make room on the disk" in line
    assert checkpoint.read_state(folder)["epoch"] == 2


@pytest.mark.slow
def test_a_disk_that_became_read_only_leaves_the_checkpoint_from_before(tiny_disk):
    save(tiny_disk / "last", 1)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(InputError, match=r"Read-only file system; the checkpoint .*is intact; mount it for writing"):
        save(tiny_disk / "last", 2)
    assert loaded(tiny_disk / "last") == 1
