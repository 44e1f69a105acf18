"""Runs of which a file was damaged: what the verbs then do, counted."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from small_runs import clat, log, timeless, train
from toughen.cli import main
from toughen.run_folder import RunFolder

VERBS = {
    "compare": ["compare"],
    "evaluate": ["evaluate", "--attacks", "clean"],
    "train": ["train", "--resume"],
}


@dataclass
class Count:
    """How the trials went; ``lost`` and ``tracebacks`` must stay empty."""

    tried: int = 0
    survived: int = 0  # the right result, from the files themselves or, with a note, from the checkpoint before
    refused: int = 0  # in one line
    lost: list[str] = field(default_factory=list)  # another result, without a word
    tracebacks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = (f"tried {self.tried}", f"survived {self.survived}", f"refused in one line {self.refused}")
        return ", ".join((*parts, f"lost {len(self.lost)}", f"tracebacks {len(self.tracebacks)}"))


def damage(file: Path, draw: random.Random) -> str:
    """Flip a bit, cut the file off, or overwrite a stretch of it with zeros, as disks do; say what was done."""
    content = bytearray(file.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    how = draw.choice((f"bit {bit} flipped", f"bit {bit} flipped", "truncated", "zeroed"))
    if how == "truncated":
        del content[place:]
    elif how == "zeroed":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        content[place] ^= 1 << bit
    file.write_bytes(bytes(content))
    return f"{how} at byte {place}"


class Victim:
    """A finished run, and what each verb makes of it as long as nothing is damaged.

    Args:
        folder: For the run, and for a copy of it for each trial.
        said: What was printed since it was called last: ``capsys.readouterr``.
    """

    def __init__(self, folder: Path, said: Callable[[], Any]) -> None:
        self.said, self.copy = said, folder / "copy"
        self.run = train(
            folder / "whole", train={"epochs": 2}, evaluate={"attacks": ["clean"]}, **clat(every=1, select="random")
        )
        self.wanted = {verb: self._undamaged(verb) for verb in VERBS}
        self.before = self._undamaged("evaluate", without="checkpoints/last")
        kinds = ("config.yaml", "*.json", "log.jsonl", "criticality/*.json", "evals/*/*.json", "checkpoints/*/*")
        self.files = sorted(file.relative_to(self.run.path) for kind in kinds for file in self.run.path.glob(kind))

    def trial(self, file: Path, verb: str, draw: random.Random, count: Count) -> None:
        """Damage a file of a copy, let a verb work on it, and count what comes of it."""
        self._renew(verb)
        if not (self.copy / file).exists():  # what marks a run as finished, where it is to be resumed
            return
        done = f"{file} {damage(self.copy / file, draw)}, then {verb}"
        count.tried += 1
        try:
            status = main([*VERBS[verb], str(self.copy)])
            out, err = self.said()
            found = self._outcome(verb, out) if status == 0 else None
        except BaseException as error:
            count.tracebacks.append(f"{done}: {type(error).__name__}: {error}")
            return
        noted = "note: " in err and (file.name == "config.yaml" or found == self.before)
        if status == 0 and (found == self.wanted[verb] or noted):
            count.survived += 1
        elif status == 2 and err.splitlines()[-1].startswith("toughen: ") and "Traceback" not in err:
            count.refused += 1
        else:
            count.lost.append(f"{done}: status {status}, {err!r}")

    def _renew(self, verb: str) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.run.path, self.copy)
        if verb == "train":
            (self.copy / "finished.json").unlink()
        self.said()

    def _undamaged(self, verb: str, *, without: str = "") -> Any:
        self._renew(verb)
        if without:
            shutil.rmtree(self.copy / without)
        assert main([*VERBS[verb], str(self.copy)]) == 0
        return self._outcome(verb, self.said()[0])

    def _outcome(self, verb: str, out: str) -> Any:
        run = RunFolder(self.copy)
        if verb == "compare":
            return out
        evaluations = timeless(run.evaluations("last"))
        if verb == "evaluate":
            return {name: evaluations["clean"][name] for name in ("epoch", "correct", "loss")}
        weights = [(run.checkpoints / name / "weights.safetensors").read_bytes() for name in ("last", "best")]
        return weights, log(run), run.reports(), evaluations
