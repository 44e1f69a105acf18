"""What a branch takes over from the methods of its run: the state of those that both have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from toughen.objectives import Live


def num_shared(run: Sequence[Any], branch: Sequence[Any]) -> int:
    """Return how many methods, from the innermost on, two stacks have in common, settings included."""
    same = [ours == theirs for ours, theirs in zip(run, branch, strict=False)]
    return len(same) if all(same) else same.index(False)


def continue_methods(live: Live, state: Mapping[str, Any], *, run: Sequence[Any], branch: Sequence[Any]) -> None:
    """Give the methods that a branch shares with its run the state that they had there; the others begin anew.

    Args:
        live: The methods of the branch, bound.
        state: The state of the run's.
        run: The run's methods, from inner to outer, as ``config.yaml`` stores them.
        branch: The branch's.
    """
    shared = num_shared(run, branch)
    if not shared:
        return
    inner: Any = live
    for _ in branch[shared:]:
        inner = getattr(inner, "inner", None)
    for _ in run[shared:]:
        state = state.get("inner", {})
    if inner is not None and state:  # a wrapper of the user's own may keep what it wraps elsewhere
        inner.load_state_dict(state)
