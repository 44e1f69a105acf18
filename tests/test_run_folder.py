import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toughen import durable, lock
from toughen.errors import InputError, Notice
from toughen.run_folder import RunFolder, write_text

CONFIG = {
    "data": {"name": "digits"},
    "threat": {"norm": "linf", "eps": 0.1},
    "train": {"lr": 0.1, "seed": 0},
    "evaluate": {"samples": None},
}


def created(path: Path) -> RunFolder:
    return RunFolder.create(path, CONFIG, {"seed": 3})


def filled(path: Path) -> RunFolder:
    run = created(path)
    run.write_log([{"epoch": 1, "losses": {"loss": 2.5}}, {"epoch": 2, "losses": {"loss": 1.25}}])
    run.write_report(0, {"layers": ["a", "b"], "criticality": [0.1, 1e-17]})
    run.write_finished({})
    return run


# -- what is read ---------------------------------------------------------------------------------


def test_what_was_written_comes_back_without_its_checksum(tmp_path):
    run = filled(tmp_path)
    assert run.log() == [{"epoch": 1, "losses": {"loss": 2.5}}, {"epoch": 2, "losses": {"loss": 1.25}}]
    assert run.reports() == {0: {"layers": ["a", "b"], "criticality": [0.1, 1e-17]}}
    assert run.provenance()["seed"] == 3
    assert run.config() == CONFIG
    assert run.finished


def test_every_reader_of_json_reads_the_files(tmp_path):
    run = filled(tmp_path)
    for file in (*run.path.glob("*.json"), *run.path.glob("criticality/*.json")):
        assert len(json.loads(file.read_text())["sha256"]) == 64
    assert [json.loads(line)["epoch"] for line in (run.path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_objects_without_a_checksum_are_read_as_they_are(tmp_path):
    run = filled(tmp_path)
    (run.path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "sha256": "of something"}\n')
    assert run.log() == [{"epoch": 1}, {"epoch": 2, "sha256": "of something"}]


@pytest.mark.parametrize("file", ["provenance.json", "log.jsonl", "criticality/epoch_0000.json"])
def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path, file):
    run = filled(tmp_path)

    def read() -> list[dict[str, Any]]:
        return [run.provenance(), *run.log(), *run.reports().values()]

    wanted, content, refused = read(), (run.path / file).read_bytes(), 0
    for place in range(0, len(content) * 8, 3):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (run.path / file).write_bytes(bytes(damaged))
        try:
            found = read()
        except InputError:
            refused += 1
        else:  # what was hit is white space
            assert found == wanted
    assert refused > 0.8 * len(content) * 8 / 3


def test_a_truncated_log_is_refused_and_not_read_as_a_shorter_one(tmp_path):
    run = filled(tmp_path)
    file = run.path / "log.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(InputError, match=r"log\.jsonl is damaged"):
        run.log()


def test_a_recipe_that_is_not_as_it_was_written_is_told(tmp_path):
    run = created(tmp_path)
    RunFolder.open(run.path)
    run.config_file.write_text(run.config_file.read_text().replace("lr: 0.1", "lr: 0.3"))
    with pytest.warns(Notice, match=r"config\.yaml is not as this run wrote it: it was changed by hand, or is damaged"):
        again = RunFolder.open(run.path)
    assert again.config()["train"]["lr"] == 0.3


@pytest.mark.parametrize("kept", range(0, 96, 12))
def test_a_recipe_that_lost_its_end_is_refused(tmp_path, kept):
    run = created(tmp_path)
    run.config_file.write_text(run.config_file.read_text()[:kept])
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        RunFolder.open(run.path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"a: 2026-99-99", b"[" * 5000, b"a: [", b"1", b"a: 2026-01-01", b"2026-01-01: 1\na: 2"],
    ids=range(7),
)
def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path, content):
    run = created(tmp_path)
    (run.path / "provenance.json").unlink()
    run.config_file.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml is damaged") as told:
        RunFolder.open(run.path).config()
    assert len(str(told.value).splitlines()) == 1


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "No space left on device; what it held is intact; make room on the disk"),
        (errno.EROFS, "Read-only file system; what it held is intact; mount it for writing"),
        (errno.ESTALE, "Stale file handle; what it held is intact; is its disk or mount still there?"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_what_cannot_be_written_is_one_line_and_the_old_content_stays(tmp_path, monkeypatch, number, fix, call):
    file = tmp_path / "log.jsonl"
    write_text(file, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(io if call == "open" else os, call, fail)
        with pytest.raises(InputError) as told:
            write_text(file, "new")
    assert str(told.value) == f"can't write {file}: {fix}"
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_folder_that_vanished_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"can't write .*log\.jsonl: No such file or directory; is its disk or mount"):
        write_text(tmp_path / "gone" / "log.jsonl", "text")


def test_folders_that_cannot_be_synced_are_written_to_all_the_same(tmp_path, monkeypatch):
    sync = os.fsync

    def partly(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(file)

    monkeypatch.setattr(durable.os, "fsync", partly)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


# -- one writer -----------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from toughen.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""
# without the package, which takes seconds to import
HOLD_WITH_WORKER = """
import fcntl, os, socket, sys, time
stream = open(sys.argv[1] + "/.lock", "w")
fcntl.flock(stream, fcntl.LOCK_EX)
print(os.getpid(), socket.gethostname(), file=stream, flush=True)
if os.fork() == 0:
    time.sleep(1)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def holder(folder: Path, program: str = HOLD) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    process.stdout.close()
    return process


@pytest.mark.slow  # the package takes seconds to import
def test_a_second_process_is_refused_until_the_first_has_ended_however_it_ends(tmp_path):
    run = RunFolder(tmp_path)
    process = holder(tmp_path)
    with (
        pytest.raises(InputError, match=rf"run .* is being written by process {process.pid} on \S+; wait"),
        run.locked(),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    with run.locked():
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_workers_that_outlive_a_killed_process_are_waited_for(tmp_path):
    process = holder(tmp_path, HOLD_WITH_WORKER)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    with RunFolder(tmp_path).locked():
        assert 0.5 < time.monotonic() - started < lock._PATIENCE


def test_the_same_process_is_refused_too_and_let_in_again_afterwards(tmp_path):
    run = RunFolder(tmp_path)
    with run.locked():
        with pytest.raises(InputError, match=rf"by process {os.getpid()} on"), run.locked():
            pass
        with pytest.raises(InputError, match="is being written by"), run.locked():
            pass
    with run.locked():
        pass


def test_two_that_begin_in_one_folder_at_once_do_not_both_find_it_free(tmp_path):
    run = RunFolder(tmp_path)
    with run.locked(), pytest.raises(InputError, match="is being written by"):
        created(tmp_path)
    created(tmp_path)
    with pytest.raises(InputError, match="already holds an unfinished run"):
        created(tmp_path)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(Notice, match=r"can't be locked \(No locks available\); make sure that no other process"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanished_cannot_be_locked(tmp_path):
    with pytest.raises(InputError, match=r"can't write .*\.lock: No such file"), RunFolder(tmp_path / "gone").locked():
        pass


def test_a_disk_that_turned_read_only_does_not_hide_what_happened_under_the_lock(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match="the checkpoint from before is intact"), RunFolder(tmp_path).locked():
        raise InputError("can't write; the checkpoint from before is intact")
    monkeypatch.undo()
    with RunFolder(tmp_path).locked():  # what was left behind locks nobody out
        pass
