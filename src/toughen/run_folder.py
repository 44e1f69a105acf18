"""Where a run keeps what: the one place that knows the names of its files. Reads and writes text, knows no torch."""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toughen.documents import parse_yaml
from toughen.durable import read_text, sealed, unsealed, write_text
from toughen.errors import InputError, Notice
from toughen.lock import locked

__all__ = ["RunFolder", "file_name", "write_text"]


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds everything about one run; it can be moved and still be read.

    ``config.yaml`` the resolved recipe; ``provenance.json`` commit, versions, hardware, command; ``log.jsonl`` one
    object per epoch; ``criticality/epoch_NNNN.json`` a report per selection, named by the epochs done before it;
    ``checkpoints/last`` and ``checkpoints/best``, and ``checkpoints/validated`` where a collapse would go back to it,
    each with the one before it (``last.old``);
    ``evals/CHECKPOINT/ATTACK.json``, and the same under ``strength`` for attacks of several strengths;
    ``examples/CHECKPOINT.safetensors`` a few images, clean and attacked; ``branches/NAME`` runs that continue this
    one; ``finished.json`` once it is complete; ``.lock`` while somebody writes.

    Every JSON object ends with a checksum of itself; that of ``config.yaml`` is in ``provenance.json``.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> "RunFolder":
        """Make a new run folder.

        Raises:
            InputError: The folder can't be written to, or holds a run already.
        """
        folder = cls(Path(path))
        if (folder.path / "sweep.json").exists():
            raise InputError(f"output folder {path} is the folder of a sweep; choose another --out")
        try:
            for part in ("criticality", "checkpoints", "evals"):
                (folder.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output folder {path} can't be written to: {error.strerror}; choose another --out"
            ) from None
        with folder.locked():  # two that begin in one folder at once must not both find it free
            folder._check_free()
            text = yaml.safe_dump(dict(config), sort_keys=False)
            facts = {**provenance, "config_sha256": _digest(text)}
            write_text(folder.path / "provenance.json", sealed(facts, indent=1) + "\n")
            write_text(folder.config_file, text)
        return folder

    def _check_free(self) -> None:
        path = self.path
        if self.config_file.exists() and not (path / "provenance.json").exists():
            raise InputError(f"output folder {path} holds a config.yaml that is no run's; choose another --out")
        if self.config_file.exists():
            state = "a finished run" if self.finished else "an unfinished run"
            fix = (
                "choose another --out"
                if self.finished
                else f"continue it with --resume {path}, or choose another --out"
            )
            raise InputError(f"output folder {path} already holds {state}; {fix}")

    @staticmethod
    def free(stem: str) -> Path:
        """Return the first of runs/STEM, runs/STEM-2, ... that holds no run."""
        paths = (Path("runs") / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
        return next(path for path in paths if not RunFolder(path).config_file.exists())

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        A recipe that is not as it was written is told: a bit may have flipped, or somebody may have wanted it so.

        Raises:
            InputError: It is none.
        """
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            inside = sorted(str(config.parent) for config in folder.path.glob("*/config.yaml"))
            fix = "give the folder that `toughen train` wrote"
            if inside:
                fix = f"give a run in it: {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}"
            raise InputError(f"{path} is not a run folder: it has no config.yaml; {fix}")
        folder._tell_changed_config()
        return folder

    def locked(self) -> AbstractContextManager[None]:
        """Inside, no other process writes this run; what a killed process left behind does not count.

        Raises:
            InputError: Another one writes it now.
        """
        return locked(self.lock_file, what=f"run {self.path}")

    @property
    def lock_file(self) -> Path:
        """What tells, while somebody writes, who does: the number of the process, and its machine."""
        return self.path / ".lock"

    @property
    def config_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints ``last`` and ``best``."""
        return self.path / "checkpoints"

    @property
    def finished_file(self) -> Path:
        """What is there once the run, its evaluations and its branches are complete."""
        return self.path / "finished.json"

    @property
    def finished(self) -> bool:
        """Whether the run, its evaluations and its branches are complete."""
        return self.finished_file.exists()

    def config(self) -> dict[str, Any]:
        """Read the resolved recipe.

        Raises:
            InputError: The file is damaged.
        """
        text = read_text(self.config_file)
        try:
            content = parse_yaml(text, what="its text")
        except InputError as error:
            raise InputError(f"{self.config_file} is damaged: {error}") from None
        if not isinstance(content, dict) or not _plain(content):
            raise InputError(f"{self.config_file} is damaged: it holds no recipe")
        return content

    def rewrite_config(self, config: Mapping[str, Any]) -> None:
        """Give a run further branches: the rest of ``config`` is its recipe, and it is not finished any more.

        Raises:
            InputError: It can't be written.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        facts = {**self.provenance(), "config_sha256": _digest(text)}
        self.finished_file.unlink(missing_ok=True)
        write_text(self.config_file, text)
        write_text(self.path / "provenance.json", sealed(facts, indent=1) + "\n")

    def provenance(self) -> dict[str, Any]:
        """Read what is known of the machine, the versions and the images of the run.

        Raises:
            InputError: The file is damaged.
        """
        file = self.path / "provenance.json"
        return unsealed(read_text(file), file)

    def _tell_changed_config(self) -> None:
        if not (self.path / "provenance.json").is_file():
            return
        written = self.provenance().get("config_sha256")
        if written is not None and written != _digest(read_text(self.config_file)):
            if not _readable(self.config()):
                raise InputError(f"{self.config_file} is damaged: it is not as this run wrote it, and lacks entries")
            message = f"{self.config_file} is not as this run wrote it: it was changed by hand, or is damaged"
            warnings.warn(message, Notice, stacklevel=3)

    def log(self) -> list[dict[str, Any]]:
        """Read the log, one object per finished epoch.

        Raises:
            InputError: The file is damaged.
        """
        file = self.path / "log.jsonl"
        lines = read_text(file).splitlines() if file.exists() else []
        return [unsealed(line, file) for line in lines]

    def write_log(self, rows: list[dict[str, Any]]) -> None:
        """Replace the log, which a resumed run may have to shorten.

        Raises:
            InputError: It can't be written.
        """
        write_text(self.path / "log.jsonl", "".join(sealed(row) + "\n" for row in rows))

    def reports(self) -> dict[int, dict[str, Any]]:
        """Read the criticality reports, by the number of epochs done before each; as plain JSON objects.

        Raises:
            InputError: One of them is damaged.
        """
        files = sorted((self.path / "criticality").glob("epoch_*.json"))
        return {int(file.stem.removeprefix("epoch_")): unsealed(read_text(file), file) for file in files}

    def write_report(self, epoch: int, report: Mapping[str, Any]) -> None:
        """Store the criticality report of a selection that was made after ``epoch`` epochs.

        Raises:
            InputError: It can't be written.
        """
        write_text(self.path / "criticality" / f"epoch_{epoch:04d}.json", sealed(report, indent=1) + "\n")

    def evals(self, checkpoint: str) -> Path:
        """The folder of the evaluations of a checkpoint."""
        return self.path / "evals" / checkpoint

    def evaluations(self, checkpoint: str) -> dict[str, dict[str, Any]]:
        """Read the complete evaluations of a checkpoint, by attack.

        Raises:
            InputError: One of them is damaged.
        """
        return _complete(self.evals(checkpoint))

    def strengths(self, checkpoint: str) -> dict[str, dict[str, Any]]:
        """Read what is in ``strength(checkpoint)``, as ``evaluations`` does."""
        return _complete(self.strength(checkpoint))

    def strength(self, checkpoint: str) -> Path:
        """The folder of the evaluations of a checkpoint under attacks of several strengths."""
        return self.path / "strength" / checkpoint

    def examples(self, checkpoint: str) -> Path:
        """The file of a few images, clean and attacked, and what a checkpoint says of them."""
        return self.path / "examples" / f"{checkpoint}.safetensors"

    def write_finished(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as complete.

        Raises:
            InputError: It can't be written.
        """
        write_text(self.finished_file, sealed(summary, indent=1) + "\n")

    def branches(self) -> Iterator["RunFolder"]:
        """Iterate over the runs that continue this one, in the order of the recipe."""
        names = self.config().get("branches") or {}
        for name in names:
            if not re.fullmatch(r"[\w-]+", str(name)):
                raise InputError(f"{self.config_file} is damaged: the branch name {name!r} leads out of the folder")
            branch = self.branch(str(name))
            if branch.config_file.is_file():
                yield branch

    @property
    def parent_run(self) -> "RunFolder | None":
        """The run of which this one is a branch, or None."""
        branches = self.path.resolve().parent
        run = RunFolder(branches.parent)
        return run if branches.name == "branches" and run.config_file.is_file() else None

    def branch(self, name: str) -> "RunFolder":
        """Return the folder of a branch, whether it exists yet or not."""
        return RunFolder(self.path / "branches" / name)


def _complete(folder: Path) -> dict[str, dict[str, Any]]:
    """The complete evaluations in a folder, by attack."""
    results = {file: unsealed(read_text(file), file) for file in sorted(folder.glob("*.json"))}
    return {found.get("attack", file.stem): found for file, found in results.items() if found.get("complete", True)}


def file_name(text: str) -> str:
    """Return a name for a file that says what ``text`` says, on every file system."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def _plain(config: Mapping[str, Any]) -> bool:
    """Whether JSON knows all of its values, as it does those of every recipe: YAML also has dates and bytes."""
    try:
        json.dumps(config, sort_keys=True)
    except TypeError:
        return False
    return True


def _readable(config: Mapping[str, Any]) -> bool:
    """Whether a recipe has what is read of it without resolving it: to compare runs, and to find branches."""
    try:
        names = (config["data"]["name"], config["threat"]["norm"])
        numbers = (config["threat"]["eps"], config["train"]["seed"])
        samples = config["evaluate"]["samples"]
    except (KeyError, TypeError):
        return False
    return (
        all(isinstance(name, str) for name in names)
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(config.get("branches") or {}, dict)
        and isinstance(samples, int | None)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
