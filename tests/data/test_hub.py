import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from public_layouts import hub_cache, write_card, write_levels
from toughen.data import DataSettings, load
from toughen.data.hub import read_hub
from toughen.errors import InputError

COMMITS = {"main": "a" * 40, "refs/convert/parquet": "b" * 40}


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does: card, list of files, and the files; ``/OWNER/NAME/REVISION`` are folders below root."""

    root: Path
    gated: bool = False
    garbled: bool = False
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        path = self.path.partition("?")[0].replace("%2F", "/").lstrip("/")
        if path.startswith("api/datasets/"):
            owner, name, verb, *rest = path.removeprefix("api/datasets/").split("/")
            self.describe(f"{owner}/{name}", verb, "/".join(rest))
        else:
            owner, name, _, commit, *rest = path.removeprefix("datasets/").split("/")
            self.send_file(self.root / owner / name / self.revision(commit) / "/".join(rest), commit)

    def revision(self, given: str) -> str:
        names = {"main": "main", "refs/convert/parquet": "converted", "a" * 40: "main", "b" * 40: "converted"}
        return names.get(given, given)

    def describe(self, repository: str, verb: str, revision: str) -> None:
        folder = self.root / repository / self.revision(revision)
        if not (self.root / repository).is_dir():
            return self.refuse(404, "RepoNotFound")
        if not folder.is_dir():
            return self.refuse(404, "RevisionNotFound")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        names = [file.relative_to(folder).as_posix() for file in files]
        if verb == "revision":
            siblings = [{"rfilename": name} for name in names]
            return self.answer(json.dumps({"id": repository, "sha": COMMITS[revision], "siblings": siblings}).encode())
        tree = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{position:040x}"}
            for position, (name, file) in enumerate(zip(names, files, strict=True))
        ]
        return self.answer(json.dumps(tree).encode())

    def send_file(self, file: Path, commit: str) -> None:
        if self.gated:
            return self.refuse(403, "GatedRepo")
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.answer(content[::-1] if self.garbled else content, **headers)

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"{}", status, **{"X-Error-Code": code})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that nobody answers for."""
    folder = tmp_path / "cache"
    for name, value in {
        "HF_HUB_CACHE": str(folder),
        "ENDPOINT": "http://127.0.0.1:9",
        "HUGGINGFACE_CO_URL_TEMPLATE": "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    return folder


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub of its own for the test."""

    class Hub(FakeHub):
        root = tmp_path / "hub"
        asked = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def read(path: str) -> tuple[list[int], list[int]]:
    train, test = read_hub(DataSettings(name="hf", path=path))
    return train.labels.tolist(), test.labels.tolist()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_cards_own_parquet_files_are_downloaded_and_nothing_else(hub: type[FakeHub]) -> None:
    folder = hub.root / "me/animals/main"
    write_card(folder / "data", 3, shards=2)
    (folder / "animals.py").write_text("raise SystemExit")
    assert read("me/animals") == ([0, 1, 2, 0, 1, 2], [2, 1, 0])
    assert not [path for path in hub.asked if "animals.py" in path]


def test_a_card_with_a_script_is_read_in_the_hubs_conversion(hub: type[FakeHub]) -> None:
    (hub.root / "me/animals/main").mkdir(parents=True)
    (hub.root / "me/animals/main/animals.py").write_text("raise SystemExit")
    for config, labels in (("small", [1, 0]), ("large", [0, 1, 1, 0])):
        for part in ("train", "validation"):
            write_levels(hub.root / f"me/animals/converted/{config}/{part}/0000.parquet", labels, labels)
    assert read("me/animals@large") == ([0, 1, 1, 0], [0, 1, 1, 0])
    assert not [path for path in hub.asked if "animals.py" in path or "small" in path]
    with pytest.raises(InputError, match="me/animals has training files in large, small; choose one of these folders"):
        read("me/animals")


def test_what_was_downloaded_is_read_again_without_a_network(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(hub.root / "me/animals/main/data", 3)
    online = read("me/animals")
    hub.asked.clear()
    go_offline(monkeypatch)
    assert read("me/animals") == online
    assert hub.asked == []


def test_a_cache_that_was_filled_elsewhere_is_read_without_a_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(tmp_path / "files" / "default", 3, test="validation")
    hub_cache(cache, "me/animals", tmp_path / "files", revision="refs/convert/parquet")
    assert read("me/animals") == ([0, 1, 2, 0, 1, 2], [2, 1, 0])  # nobody answers
    go_offline(monkeypatch)
    splits = load(DataSettings(name="hf:me/animals@default", validation=3))
    assert splits.test.labels.tolist() == [2, 1, 0]


def test_an_interrupted_download_is_not_taken_for_the_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    write_card(tmp_path / "files", 3, shards=3)
    (tmp_path / "files" / "train-00001-of-00003.parquet").unlink()
    hub_cache(cache, "me/animals", tmp_path / "files")
    with pytest.raises(InputError, match=r"the cache does not hold \(all of\) it"):
        read("me/animals")


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="this huggingface_hub does not keep lists of files"
)
def test_a_file_that_is_missing_from_the_cache_is_missed(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.root / "me/animals/main").mkdir(parents=True)
    for name in ("train/0000", "train/0001", "test/0000"):
        write_levels(hub.root / f"me/animals/converted/default/{name}.parquet", [0, 1], [1, 0])
    assert len(read("me/animals")[0]) == 4
    next(Path(constants.HF_HUB_CACHE).rglob("train/0001.parquet")).unlink()
    go_offline(monkeypatch)
    with pytest.raises(InputError, match=r"the cache does not hold \(all of\) it"):
        read("me/animals")


@pytest.mark.parametrize("offline", [True, False])
def test_out_of_reach_and_not_in_the_cache_is_one_line(
    offline: bool,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if offline:
        go_offline(monkeypatch)
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as caught:
        read("me/animals")
    kind = "OfflineModeIsEnabled" if offline else "ConnectError"
    assert str(caught.value) == (
        f"the data set me/animals cannot be downloaded ({kind}) and the cache does not hold (all of) it;"
        " connect to the network once, or use a local copy: parquet:FOLDER"
    )
    assert [record for record in caplog.records if record.name.startswith("huggingface_hub")] == []
    assert "".join(capfd.readouterr()) == ""


def test_a_connection_that_breaks_off_is_one_line(hub: type[FakeHub], caplog: pytest.LogCaptureFixture) -> None:
    write_card(hub.root / "me/animals/main", 3)
    hub.send_file = lambda self, *_: self.connection.close()  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"^the data set me/animals cannot be downloaded \(.*\) and the cache"):
        read("me/animals")
    assert [record for record in caplog.records if record.name.startswith("huggingface_hub")] == []


def test_a_gated_data_set_says_where_to_accept_its_terms(hub: type[FakeHub]) -> None:
    write_card(hub.root / "me/animals/main", 3)
    hub.gated = True
    with pytest.raises(
        InputError, match=r"gated: accept its terms at https://huggingface\.co/datasets/me/animals, then"
    ):
        read("me/animals")


def test_an_unknown_data_set_and_one_without_parquet_are_named(hub: type[FakeHub]) -> None:
    with pytest.raises(InputError, match="there is no data set me/plants on the hub, or it is private"):
        read("me/plants")
    (hub.root / "me/animals/main").mkdir(parents=True)
    with pytest.raises(InputError, match=r"me/animals on the hub has no files \[CONFIG\]/train-\*\.parquet"):
        read("me/animals")


def test_a_conversion_of_the_first_rows_only_is_refused(hub: type[FakeHub]) -> None:
    (hub.root / "me/animals/main").mkdir(parents=True)
    write_levels(hub.root / "me/animals/converted/default/partial-train/0000.parquet", [0], [0])
    with pytest.raises(InputError, match=r"only the first rows of the training part \(default/partial-train\)"):
        read("me/animals")


@pytest.mark.parametrize("path", ["animals", "me/animals/2", "me/", "https://huggingface.co/me"])
def test_what_is_no_name_on_the_hub_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="is not the name of a data set on the hub; write hf:OWNER/NAME"):
        read(path)


def test_a_download_that_is_not_what_the_hub_has_is_refused_and_not_kept(hub: type[FakeHub]) -> None:
    write_card(hub.root / "me/animals/main/data", 3)
    hub.garbled = True
    with pytest.raises(
        InputError, match=r"train-00000-of-00001\.parquet was not what the hub has: its checksum differs"
    ):
        read("me/animals")
    hub.garbled = False
    assert read("me/animals") == ([0, 1, 2, 0, 1, 2], [2, 1, 0])
