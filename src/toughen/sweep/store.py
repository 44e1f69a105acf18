"""The folder of a sweep: its run folders, and ``sweep.json``, which says what each was for and how far it came."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from toughen.config import recipe_of, resolve
from toughen.durable import read_text, sealed, unsealed, write_text
from toughen.errors import InputError
from toughen.lock import locked
from toughen.run_folder import RunFolder
from toughen.sweep.grid import Run, Sweep

State = Literal["waiting", "running", "finished", "failed", "stopped"]
STORE, RECIPE, OUTPUT = "sweep.json", "recipe.yaml", "output.log"


def train_words(folder: str) -> tuple[str, ...]:
    """Return the words behind ``toughen`` that begin a run which is laid out."""
    return ("train", f"{folder}/{RECIPE}", "--out", folder)


def resume_words(folder: str) -> tuple[str, ...]:
    """Return the words that go on with it."""
    return ("train", "--resume", folder)


@dataclass
class Progress:
    """How far one run of a sweep came.

    Attributes:
        run: Which.
        folder: Its run folder.
        state: ``"failed"`` has a message; ``"stopped"`` goes on with the next call.
        attempts: Times that it was started by this call of the sweep.
        message: What ended it, in one line.
    """

    run: Run
    folder: RunFolder
    state: State = "waiting"
    attempts: int = 0
    message: str = ""


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep: ``sweep.json`` and ``NAME/seed-N``, run folders with a ``recipe.yaml`` each."""

    path: Path

    def lay_out(self, sweep: Sweep) -> list[Progress]:
        """Write down what is to be run, and find what is done already.

        Raises:
            InputError: A run was begun here with other settings, or under another name; or a file can't be written.
        """
        if "=" in str(self.path):
            raise InputError(
                f"{self.path} holds '=', which `toughen train` takes for an override; choose another --out"
            )
        if RunFolder(self.path).config_file.exists():
            raise InputError(f"sweep folder {self.path} is the folder of a run; choose another --out")
        found = [
            _taken_up(Progress(run, RunFolder(self.path / run.name)), allow_code=sweep.allow_code) for run in sweep.runs
        ]
        self._check_names(found)
        for one in found:  # only now, when nothing more is refused
            _add_branches(one)
            _make(one.folder.path)
            write_text(one.folder.path / RECIPE, yaml.safe_dump(one.run.document, sort_keys=False))
        self.write(sweep, found)
        return found

    def _check_names(self, runs: Sequence[Progress]) -> None:
        """Refuse to train once more what was begun under another name, since names say what differs in the file."""
        before = {_text(entry.get("recipe")): self.path / str(entry["folder"]) for entry in self._before()}
        for one in runs:
            old = before.get(_text(one.run.document), one.folder.path)
            if not one.folder.config_file.exists() and RunFolder(old).config_file.exists():
                raise InputError(
                    f"run {old} is called {one.run.name} since the file of the sweep was changed; move its folder to"
                    f" {one.folder.path}, or remove it, and it is trained anew"
                )

    def _before(self) -> list[dict[str, Any]]:
        """The entries of ``sweep.json``, none where it is damaged: it is written anew."""
        try:
            return _entries(self.path / STORE) if (self.path / STORE).is_file() else []
        except InputError:
            return []

    def write(self, sweep: Sweep, runs: Sequence[Progress]) -> None:
        """Write ``sweep.json``; runs of before that are no part of this sweep stay in it while they are there."""
        names = {one.run.name for one in runs}
        others = [
            entry
            for entry in self._before()
            if entry["folder"] not in names and _inside(entry["folder"]) and self._begun(entry["folder"])
        ]
        content = {
            "name": sweep.name,
            "file": sweep.file,
            "resources": {"cpus": sweep.resources.cpus, "gpus": sweep.resources.gpus},
            "retries": sweep.retries,
            "runs": [
                {
                    "folder": one.run.name,
                    "seed": one.run.seed,
                    "changes": dict(one.run.changes),
                    "state": one.state,
                    "attempts": one.attempts,
                    "message": one.message,
                    "recipe": one.run.document,
                }
                for one in runs
            ]
            + others,
        }
        write_text(self.path / STORE, sealed(content, indent=1) + "\n")

    def _begun(self, name: str) -> bool:
        return RunFolder(self.path / name).config_file.is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process works on this sweep; what a killed one left behind does not count.

        Raises:
            InputError: One does, or the folder can't be written to.
        """
        _make(self.path)
        with locked(self.path / ".lock", what=f"sweep {self.path}"):
            yield


def finished_runs(path: Path) -> tuple[list[RunFolder], list[str]] | None:
    """Read which runs of a sweep are finished, and the names of the others; None where ``path`` is no sweep's folder.

    Raises:
        InputError: Its ``sweep.json`` is damaged, or none of its runs is finished.
    """
    file = path / STORE
    if not file.is_file():
        return None
    names = [str(entry["folder"]) for entry in _entries(file)]
    if outside := [name for name in names if not _inside(name)]:
        raise InputError(f"{file} is damaged: {outside[0]!r} is no folder in it")
    finished = [name for name in names if RunFolder(path / name).finished]
    if not finished:
        raise InputError(f"sweep {path} has no finished run yet; go on with the `toughen sweep` command that began it")
    return [RunFolder.open(path / name) for name in finished], [name for name in names if name not in finished]


def _entries(file: Path) -> list[dict[str, Any]]:
    entries = unsealed(read_text(file), file).get("runs")
    if isinstance(entries, list) and all(isinstance(e, dict) and isinstance(e.get("folder"), str) for e in entries):
        return entries
    raise InputError(f"{file} is damaged: it holds no runs; write it anew with the `toughen sweep` command")


def _text(recipe: Any) -> str:
    return json.dumps(recipe, sort_keys=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"sweep folder {folder} can't be made: {error.strerror}; choose another --out") from None


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _taken_up(one: Progress, *, allow_code: Sequence[str]) -> Progress:
    """Look at what was begun in a run folder: it may have further branches, and may get some.

    Raises:
        InputError: It was begun with other settings.
    """
    if not one.folder.config_file.exists():
        return one
    begun, wanted = recipe_of(one.folder, allow_code=allow_code).document(), one.run.document
    branches = {**wanted.get("branches", {}), **begun.get("branches", {})}
    if "branches" in begun and "branches" in wanted:
        wanted = {**wanted, "branches": branches}
    for section in (wanted.keys() | begun.keys()) - {"description", "branches"}:
        _check_same(section, begun.get(section), wanted.get(section), one.folder)
    for name, branch in one.run.document.get("branches", {}).items():
        _check_same(f"branches.{name}", branches[name], branch, one.folder)
    one.run = replace(one.run, recipe=resolve(wanted))
    one.state = "finished" if one.folder.finished and not _new_branches(one) else "waiting"
    return one


def _new_branches(one: Progress) -> set[str]:
    return set(one.run.recipe.branches) - set(one.folder.config().get("branches", {}))


def _add_branches(one: Progress) -> None:
    """Write further branches into the settings of a run that has begun; they go on from where it branched."""
    if one.folder.config_file.exists() and _new_branches(one):
        one.folder.rewrite_config(one.run.document)


def _check_same(section: str, begun: Any, wanted: Any, folder: RunFolder) -> None:
    if begun != wanted:
        raise InputError(
            f"run {folder.path} was begun with other settings of {section} than the sweep has now"
            f" ({_unlike(begun, wanted)}); choose another --out, or change it back"
        )


def _unlike(begun: Any, wanted: Any) -> str:
    """Say where two sections differ first."""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        key = next(key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key))
        return f"{key} {_unlike(begun.get(key), wanted.get(key))}"
    return f"{begun} before, {wanted} now"
