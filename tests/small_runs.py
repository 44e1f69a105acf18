"""Runs of about a second on the embedded digits, and what two of them may be compared by."""

import hashlib
from copy import deepcopy
from pathlib import Path
from typing import Any

from toughen.config import resolve
from toughen.engine import Recipe, Trainer
from toughen.run_folder import RunFolder

DOCUMENT: dict[str, Any] = {
    "model": {"name": "small_cnn", "width": 2},
    "data": {
        "name": "digits",
        "validation": 20,
        "train_samples": 60,
        "test_samples": 40,
        "augment": [{"name": "crop", "pad": 1}],
    },
    "threat": {"norm": "linf", "eps": 0.15},
    "attack": {"name": "pgd", "step_size": 0.05, "steps": 2},
    "method": [{"name": "pgd-at"}],
    "train": {"epochs": 2, "batch_size": 20, "lr": 0.05, "device": "cpu"},
    "evaluate": {"attacks": ["clean", "pgd-2"]},
}
SHRINK = (
    "model.width=2",
    "data.validation=20",
    "data.train_samples=60",
    "data.test_samples=40",
    "attack.steps=2",
    "train.batch_size=20",
    "train.device=cpu",
)
PGD_AT = {"name": "pgd-at"}
TIMINGS = ("seconds", "images_per_second")


def clat(**settings: Any) -> dict[str, Any]:
    """CLAT on PGD-AT with one critical layer, as a list of methods for a recipe."""
    return {"method": [PGD_AT, {"name": "clat", "k": 1, **settings}]}


def document(**sections: Any) -> dict[str, Any]:
    """The small recipe as plain values, with sections changed key by key, or replaced if they are no mappings."""
    changed = deepcopy(DOCUMENT)
    for name, value in deepcopy(sections).items():
        merge = isinstance(value, dict) and name in changed
        changed[name] = {**changed[name], **value} if merge else value
    return changed


def recipe(**sections: Any) -> Recipe:
    return resolve(document(**sections))


def train(folder: Path, **sections: Any) -> RunFolder:
    return Trainer(recipe(**sections), out=folder).fit()


def resume(folder: Path) -> RunFolder:
    """Go on as the command line does: from the folder alone."""
    return Trainer(resolve(RunFolder.open(folder).config()), out=folder, resume=True).fit()


def fingerprints(run: RunFolder) -> dict[str, str]:
    """The hash of every file of weights of a run and of its branches; what was kept of before depends on stops."""
    files = sorted(file for file in run.path.rglob("*.safetensors") if not file.parent.name.endswith(".old"))
    return {str(file.relative_to(run.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def log(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of the log without what a clock decides."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in run.log()]


def outcome(run: RunFolder) -> dict[str, Any]:
    """Everything about a run that must not depend on whether it was interrupted."""
    members = [run, *run.branches()]
    return {
        "weights": fingerprints(run),
        "logs": [log(member) for member in members],
        "selections": [member.reports() for member in members],
        "evaluations": [timeless(member.evaluations(name)) for member in members for name in ("last", "best")],
    }


def timeless(evaluations: dict[str, Any]) -> dict[str, Any]:
    """Evaluations without the time that they took."""
    for found in evaluations.values():
        for stage in found["stages"]:
            del stage["seconds"]
    return evaluations
