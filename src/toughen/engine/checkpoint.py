"""Checkpoints: weights as safetensors beside a state that loads without running code; the last two are kept, whole."""

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from toughen.durable import refusal, sync_folder
from toughen.engine.versions import FORMAT, check_resumable, migrated
from toughen.errors import InputError, Notice, first_line
from toughen.models import restore_weights

WEIGHTS, STATE, SUMS = "weights.safetensors", "state.pt", "sha256"

T = TypeVar("T")


class _Damaged(Exception):
    """How the files of one checkpoint are: missing, or damaged and where."""


def save(folder: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write weights and state, and put them in the place of ``folder`` once they are complete.

    What was there becomes ``folder.old``, unless it is damaged or of the same epoch and step: then the one before it
    stays. At every moment one of the two is whole, also if the process is killed or the power fails.

    Args:
        folder: For example ``checkpoints/last``; the folder around it must exist.
        model: Whose parameters and buffers are saved.
        state: Tensors and plain values, nested in dicts, lists and tuples.

    Raises:
        InputError: The disk is full, read-only or gone; the message says which checkpoint is left.
    """
    draft = _beside(folder, "tmp")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    try:
        with _system_errors():
            _clear(folder)
            draft.mkdir()  # not its parents: where a mount has vanished, they would be made beneath it
            _write(draft, tensors, {"format": FORMAT, **state})
            _put_in_place(draft, folder, place=(state.get("epoch"), state.get("step")))
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise refusal(folder, error, kept=_kept(folder)) from None


def exists(folder: Path) -> bool:
    """Return whether a checkpoint or its predecessor is there, be they damaged: then reading says so."""
    return any(candidate.is_dir() for candidate in _candidates(folder))


def load(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights to evaluate into ``model`` and return the state; where they are damaged, of the one before.

    Raises:
        InputError: There is no checkpoint, it and its predecessor are damaged, or it is of another format or model.
    """

    def take(whole: Path, state: dict[str, Any]) -> dict[str, Any]:
        restore_weights(model, whole / WEIGHTS)
        return state

    return _newest(folder, take)


def load_training(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights that training goes on with, and return the state.

    They are others than those to evaluate where a method averages or adapts; a model to which adapters are not, or no
    longer, attached gets the weights to evaluate.

    Raises:
        InputError: See ``load``.
    """

    def take(whole: Path, state: dict[str, Any]) -> dict[str, Any]:
        check_resumable(state, folder=whole)
        if not take_training(state, model):
            restore_weights(model, whole / WEIGHTS)
        return state

    return _newest(folder, take)


def take_training(state: Mapping[str, Any], model: nn.Module) -> bool:
    """Load the weights that training goes on with, where they are others than those to evaluate and fit the model.

    Returns:
        Whether there were such weights.

    Raises:
        InputError: They are named as the model's, and of other shapes.
    """
    training, own = state.get("training"), model.state_dict()
    if training is None or training.keys() != own.keys():
        return False
    other = [name for name in own if training[name].shape != own[name].shape]
    if other:
        shapes = f"{list(training[other[0]].shape)} there and {list(own[other[0]].shape)} here"
        raise InputError(f"the checkpoint belongs to another model: {other[0]!r} is {shapes}; was the recipe changed?")
    model.load_state_dict(training)
    return True


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint without its weights; where it is damaged, of the one before.

    Raises:
        InputError: There is no checkpoint, it and its predecessor are damaged, or it is of another format.
    """
    return _newest(folder, lambda _, state: state)


def whole_weights(folder: Path) -> Path:
    """Return the file of the weights to evaluate, once it is as it was written; where it is not, of the one before.

    Raises:
        InputError: See ``load``.
    """
    return _newest(folder, lambda whole, _: whole / WEIGHTS)


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(draft: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    save_file(tensors, draft / WEIGHTS)
    with (draft / STATE).open("wb") as stream:  # a stream of ours: torch's own forgets what the system said
        torch.save(state, stream)
    shutil.copymode(draft / STATE, draft / WEIGHTS)  # safetensors lets nobody else read its files
    (draft / SUMS).write_text(_sums(draft))
    for name in (WEIGHTS, STATE, SUMS):
        with (draft / name).open("rb") as written:
            os.fsync(written.fileno())
    sync_folder(draft)


def _put_in_place(draft: Path, folder: Path, *, place: tuple[Any, Any]) -> None:
    """Three renames, between any two of which ``folder`` or its predecessor is whole."""
    old, gone = _beside(folder, "old"), _beside(folder, "gone")
    if folder.exists():
        current = _place(folder)
        # what is damaged must not take the place of a whole one; nor what is repeated that of what it follows
        if current is None or (current == place and _place(old) is not None):
            folder.rename(gone)
        else:
            if old.exists():
                old.rename(gone)
            folder.rename(old)
    draft.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for kind in ("tmp", "gone"):
        shutil.rmtree(_beside(folder, kind), ignore_errors=True)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Inside, what torch and safetensors make of an error of the system is that error again."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        number = re.search(r"os error (\d+)", str(error))
        if cause is None and number is None:
            raise
        raise cause or OSError(int(number[1]), os.strerror(int(number[1]))) from None  # type: ignore[index]


def _kept(folder: Path) -> str:
    for candidate in _candidates(folder):
        try:
            return f"the checkpoint from before{_told_place(_verified(candidate))}, {candidate}, is intact"
        except (_Damaged, InputError):
            continue
    return ""


# -- reading ----------------------------------------------------------------------------------------------------------


def _newest(folder: Path, take: Callable[[Path, dict[str, Any]], T]) -> T:
    """Do something with the newest checkpoint that is whole; once more if it was replaced meanwhile.

    Weights and state of two checkpoints would be a network that never was.
    """
    while True:
        before = _identities(folder)
        try:
            found, remark = _take_newest(folder, take)
        except InputError:
            if _identities(folder) == before:
                raise
            continue
        if _identities(folder) == before:
            break
    if remark:
        warnings.warn(remark, Notice, stacklevel=3)
    return found


def _take_newest(folder: Path, take: Callable[[Path, dict[str, Any]], T]) -> tuple[T, str]:
    if not exists(folder):
        raise InputError(f"no checkpoint in {folder}; has the run finished an epoch yet?")
    damages = []
    for candidate in _candidates(folder):
        try:
            state = _verified(candidate)
        except _Damaged as damage:
            damages.append(f"checkpoint {candidate} is {damage}")
            continue
        found = take(candidate, state)
        return found, "; ".join([*damages, f"the one before it is used{_told_place(state)}"]) if damages else ""
    there = [damage for damage, candidate in zip(damages, _candidates(folder), strict=True) if candidate.is_dir()]
    raise InputError(f"{'; '.join(there)}; there is no other, so begin the run anew or copy the folder from a backup")


def _verified(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint whose files are those that were written.

    Raises:
        _Damaged: They are not.
        InputError: They are, and of another version.
    """
    try:
        _check_sums(folder)
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except _Damaged:
        raise
    except OSError as error:
        raise _Damaged(f"damaged: {Path(error.filename or folder).name} can't be read ({error.strerror})") from None
    except Exception as error:  # the readers of a damaged file raise whatever they stumble over
        raise _Damaged(f"damaged: {STATE} can't be read ({first_line(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise _Damaged(f"damaged: {STATE} holds no state")
    return migrated(state, folder=folder)


def _check_sums(folder: Path) -> None:
    # torch's reader checks no sum of its own: a flipped bit in the momentum would go unnoticed
    if not folder.is_dir():
        raise _Damaged("missing")
    for name in (SUMS, WEIGHTS, STATE):
        if not (folder / name).is_file():
            raise _Damaged(f"damaged: {name} is missing")
    written = (folder / SUMS).read_bytes()
    for line in _sums(folder).encode().splitlines():
        if line not in written.splitlines():
            raise _Damaged(f"damaged: {line.split()[-1].decode()} is not as it was written")


def _sums(folder: Path) -> str:
    """The SHA-256 of both files, as ``sha256sum --check`` reads them."""
    lines = []
    for name in (WEIGHTS, STATE):
        with (folder / name).open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def _place(folder: Path) -> tuple[Any, Any] | None:
    """The epoch and the step of a checkpoint; None where there is none that is whole."""
    try:
        _check_sums(folder)
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)  # no tensor is read
        return state.get("epoch"), state.get("step")
    except Exception:  # the readers of a damaged file raise whatever they stumble over
        return None


def _told_place(state: Mapping[str, Any]) -> str:
    if "epoch" not in state:
        return ""
    step = f", step {state['step']}" if state.get("step") else ""
    return f" (epoch {state['epoch']}{step})"


def _identities(folder: Path) -> list[tuple[int, int, int] | None]:
    """What tells one folder from another that has taken its name."""
    found: list[tuple[int, int, int] | None] = []
    for candidate in _candidates(folder):
        try:
            status = candidate.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns))
    return found


def _candidates(folder: Path) -> tuple[Path, Path]:
    """Newest first."""
    return folder, _beside(folder, "old")


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")
