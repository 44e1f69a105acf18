"""Whether the state of a checkpoint can be taken up: its format, its names, its shapes. Reads no files."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toughen.errors import InputError

FORMAT = 3  # 1 had no names of parameters; 2 did not count the updates left out of an epoch


# what a state holds by these names; a file of anybody's can hold anything, its checksums in order
_KINDS: Mapping[str, tuple[type, ...]] = {
    **{"epoch": (int,), "step": (int,), "sums": (dict,), "log": (list,), "past": (list,), "live": (dict,)},
    **{"optimizer": (dict,), "parameter_names": (list, tuple), "training": (dict, type(None))},
}


def migrated(state: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """Return the state as this version would have written it.

    Args:
        state: As it was written, with its ``format``.
        folder: Where it is from, for messages.

    Raises:
        InputError: It is of a newer format, or of one that knew too little, or was not written by toughen.
    """
    number = state["format"]
    if number > FORMAT:
        raise InputError(f"checkpoint {folder} was written by a newer toughen (format {number}, not {FORMAT}); update")
    if number < 2:
        raise InputError(
            f"checkpoint {folder} was written by an older toughen (format {number}, not {FORMAT}), which kept less than"
            " is needed here; go on with that version, which the run's provenance.json names"
        )
    _check_kinds(state, folder=folder)
    if number == 2 and not state.get("step"):
        return {**state, "format": FORMAT, "sums": {}}  # an epoch begins with none
    if number == 2 and "updates left out" in state.get("sums", {}):
        return {**state, "format": FORMAT}
    return state


def _check_kinds(state: Mapping[str, Any], *, folder: Path) -> None:
    if "epoch" not in state:  # the one name that an evaluation reads as well
        raise InputError(f"checkpoint {folder} was not written by toughen: it lacks epoch")
    for name, kinds in _KINDS.items():
        if name in state and not isinstance(state[name], kinds):
            raise InputError(
                f"checkpoint {folder} was not written by toughen: {name} is a {type(state[name]).__name__}"
            )


def check_resumable(state: Mapping[str, Any], *, folder: Path) -> None:
    """Refuse a state that can be evaluated, and not trained on from.

    Raises:
        InputError: It is of the middle of an epoch whose sums knew too little.
    """
    if state["format"] != FORMAT:
        raise InputError(
            f"checkpoint {folder} was written in the middle of an epoch by an older toughen (format {state['format']},"
            f" not {FORMAT}); finish that epoch with that version, which the run's provenance.json names"
        )


def check_state(state: Mapping[str, Any], names: Collection[str], *, folder: Path) -> None:
    """Refuse a state that lacks something, or knows something that would be ignored.

    Args:
        state: Of a checkpoint.
        names: What it must hold beside its format, no more and no less.
        folder: Where it is from, for messages.

    Raises:
        InputError: Names what is missing and what is left over.
    """
    missing, extra = sorted(set(names) - state.keys()), sorted(state.keys() - {"format", *names})
    wrong = [f"{said} {', '.join(them)}" for said, them in (("it lacks", missing), ("it also holds", extra)) if them]
    if wrong:
        raise InputError(
            f"checkpoint {folder} was written by another version of toughen: {'; '.join(wrong)};"
            " go on with that version, which the run's provenance.json names"
        )


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    found: Sequence[str],
    wanted: Sequence[str],
    *,
    folder: Path,
) -> None:
    """Refuse the state of an optimizer that is not one of the very same parameters.

    Args:
        optimizer: That is to take it up.
        state: Of the optimizer that was saved.
        found: The names of its parameters, in their order.
        wanted: Those of ``optimizer``.
        folder: Where it is from, for messages.

    Raises:
        InputError: The parameters are others, in another order or of other shapes, or another kind of optimizer's.
    """
    source = f"the optimizer's state in checkpoint {folder}"
    if list(found) != list(wanted):
        other = sorted(set(found) ^ set(wanted))
        what = f"of other parameters: {', '.join(other[:5])}" if other else "of parameters in another order"
        raise InputError(f"{source} is {what}; was the recipe changed, or toughen updated?")
    own = optimizer.state_dict()["param_groups"]
    if [group.keys() for group in own] != [group.keys() for group in state["param_groups"]]:
        raise InputError(f"{source} is of another kind of optimizer; was train.optimizer or norm_decay changed?")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for number, kept in state["state"].items():
        if number not in parameters:
            raise InputError(f"{source} is of {number + 1} parameters or more, and there are {len(parameters)}")
        for what, value in kept.items():
            if isinstance(value, Tensor) and value.shape not in (parameters[number].shape, ()):
                shapes = f"{list(value.shape)} there and {list(parameters[number].shape)} here"
                raise InputError(
                    f"{source} does not fit: {what} of {wanted[number]} is {shapes}; was the recipe changed?"
                )
