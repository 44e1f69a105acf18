"""Checkpoints: weights as safetensors beside a state that loads without running code; replaced whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from toughen.errors import InputError, first_line
from toughen.models import restore_weights

FORMAT = 2
WEIGHTS, STATE, SUMS = "weights.safetensors", "state.pt", "sha256"


def save(folder: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write weights and state, and put them in the place of ``folder`` once they are complete.

    At every moment ``folder`` or its predecessor ``folder.old`` is whole, also if the process is killed.

    Args:
        folder: For example ``checkpoints/last``.
        model: Whose parameters and buffers are saved.
        state: Tensors and plain values, nested in dicts, lists and tuples.
    """
    draft, old = folder.with_name(folder.name + ".tmp"), _predecessor(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(tensors, draft / WEIGHTS)
    torch.save({"format": FORMAT, **state}, draft / STATE)
    (draft / SUMS).write_text(_sums(draft))
    for file in draft.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def exists(folder: Path) -> bool:
    """Return whether a complete checkpoint is there (or its predecessor, after a kill between two renames)."""
    return _whole(folder) is not None


def load(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights to evaluate into ``model`` and return the state.

    Raises:
        InputError: There is no checkpoint, it is damaged, of another format, or of another model.
    """
    state = read_state(folder)
    restore_weights(model, _found(folder) / WEIGHTS)
    return state


def load_training(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights that training goes on with, and return the state.

    They are others than those to evaluate where a method averages or adapts; a model to which adapters are not, or no
    longer, attached gets the weights to evaluate.

    Raises:
        InputError: See ``load``.
    """
    state = read_state(folder)
    if not take_training(state, model):
        restore_weights(model, _found(folder) / WEIGHTS)
    return state


def take_training(state: Mapping[str, Any], model: nn.Module) -> bool:
    """Load the weights that training goes on with, where they are others than those to evaluate and fit the model.

    Returns:
        Whether there were such weights.
    """
    training = state["training"]
    if training is None or training.keys() != model.state_dict().keys():
        return False
    model.load_state_dict(training)
    return True


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint without its weights.

    Raises:
        InputError: There is no checkpoint, it is damaged, or of another format.
    """
    whole = _found(folder)
    if not _intact(whole):
        raise InputError(f"checkpoint {whole} is damaged: its files are not those that {whole / SUMS} was written for")
    try:
        state = torch.load(whole / STATE, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {whole} is damaged: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"checkpoint {whole} is not of format {FORMAT}; it was written by another version of toughen")
    return state


def _found(folder: Path) -> Path:
    whole = _whole(folder)
    if whole is None:
        raise InputError(f"no checkpoint in {folder}; has the run finished an epoch yet?")
    return whole


def _whole(folder: Path) -> Path | None:
    for candidate in (folder, _predecessor(folder)):
        if (candidate / STATE).is_file():
            return candidate
    return None


def _intact(folder: Path) -> bool:
    # torch's reader checks no sum of its own: a flipped bit in the momentum would go unnoticed
    try:
        return _sums(folder).encode() == (folder / SUMS).read_bytes()
    except OSError:
        return False


def _sums(folder: Path) -> str:
    """The SHA-256 of both files, as ``sha256sum --check`` reads them."""
    names = (WEIGHTS, STATE)
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def _predecessor(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
