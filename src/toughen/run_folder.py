"""Where a run keeps what: the one place that knows the names of its files. Reads and writes text, knows no torch."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toughen.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds everything about one run; it can be moved and still be read.

    ``config.yaml`` the resolved recipe; ``provenance.json`` commit, versions, hardware, command; ``log.jsonl`` one
    object per epoch; ``criticality/epoch_NNNN.json`` a report per selection, named by the epochs done before it;
    ``checkpoints/last`` and ``checkpoints/best``, and ``checkpoints/validated`` where a collapse would go back to it;
    ``evals/CHECKPOINT/ATTACK.json``; ``branches/NAME`` runs that
    continue this one; ``finished.json`` once it is complete.
    """

    path: Path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> "RunFolder":
        """Make a new run folder.

        Raises:
            InputError: The folder can't be written to, or holds a run already.
        """
        folder = cls(Path(path))
        if folder.config_file.exists() and not (folder.path / "provenance.json").exists():
            raise InputError(f"output folder {path} holds a config.yaml that is no run's; choose another --out")
        if folder.config_file.exists():
            state = "a finished run" if folder.finished else "an unfinished run"
            fix = (
                "choose another --out"
                if folder.finished
                else f"continue it with --resume {path}, or choose another --out"
            )
            raise InputError(f"output folder {path} already holds {state}; {fix}")
        try:
            for part in ("criticality", "checkpoints", "evals"):
                (folder.path / part).mkdir(parents=True, exist_ok=True)
            write_text(folder.path / "provenance.json", json.dumps(provenance, indent=1) + "\n")
            write_text(folder.config_file, yaml.safe_dump(dict(config), sort_keys=False))
        except OSError as error:
            raise InputError(
                f"output folder {path} can't be written to: {error.strerror}; choose another --out"
            ) from None
        return folder

    @staticmethod
    def free(stem: str) -> Path:
        """Return the first of runs/STEM, runs/STEM-2, ... that holds no run."""
        paths = (Path("runs") / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
        return next(path for path in paths if not RunFolder(path).config_file.exists())

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            InputError: It is none.
        """
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise InputError(
                f"{path} is not a run folder: it has no config.yaml; give the folder that `toughen train` wrote"
            )
        return folder

    @property
    def config_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints ``last`` and ``best``."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run, its evaluations and its branches are complete."""
        return (self.path / "finished.json").exists()

    def config(self) -> dict[str, Any]:
        """Read the resolved recipe.

        Raises:
            InputError: The file is damaged.
        """
        try:
            content = yaml.safe_load(self.config_file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config_file} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict):
            raise InputError(f"{self.config_file} is damaged: it holds no recipe")
        return content

    def provenance(self) -> dict[str, Any]:
        """Read what is known of the machine, the versions and the images of the run."""
        file = self.path / "provenance.json"
        return _parsed(file.read_text(), file)

    def log(self) -> list[dict[str, Any]]:
        """Read the log, one object per finished epoch."""
        file = self.path / "log.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [_parsed(line, file) for line in lines if line.endswith("}")]

    def write_log(self, rows: list[dict[str, Any]]) -> None:
        """Replace the log, which a resumed run may have to shorten."""
        write_text(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def reports(self) -> dict[int, dict[str, Any]]:
        """Read the criticality reports, by the number of epochs done before each; as plain JSON objects."""
        files = sorted((self.path / "criticality").glob("epoch_*.json"))
        return {int(file.stem.removeprefix("epoch_")): _parsed(file.read_text(), file) for file in files}

    def write_report(self, epoch: int, report: Mapping[str, Any]) -> None:
        """Store the criticality report of a selection that was made after ``epoch`` epochs."""
        write_text(self.path / "criticality" / f"epoch_{epoch:04d}.json", json.dumps(report, indent=1) + "\n")

    def evals(self, checkpoint: str) -> Path:
        """The folder of the evaluations of a checkpoint."""
        return self.path / "evals" / checkpoint

    def evaluations(self, checkpoint: str) -> dict[str, dict[str, Any]]:
        """Read the complete evaluations of a checkpoint, by attack."""
        files = sorted(self.evals(checkpoint).glob("*.json"))
        results = {file: _parsed(file.read_text(), file) for file in files}
        return {found.get("attack", file.stem): found for file, found in results.items() if found.get("complete", True)}

    def write_finished(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as complete."""
        write_text(self.path / "finished.json", json.dumps(summary, indent=1) + "\n")

    def branches(self) -> Iterator["RunFolder"]:
        """Iterate over the runs that continue this one, in the order of the recipe."""
        names = self.config().get("branches") or {}
        for name in names:
            branch = self.branch(name)
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


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: it holds no JSON object")
    return content


def file_name(text: str) -> str:
    """Return a name for a file that says what ``text`` says, on every file system."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def write_text(file: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new content is there, whole."""
    draft = file.with_name(file.name + ".tmp")
    with draft.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
