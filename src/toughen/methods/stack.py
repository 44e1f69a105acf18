"""Composition: ``stack(PGDAT(), CLAT(k=3))`` reads inner to outer and is the table label "PGD-AT + CLAT"."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from toughen.attacks import Attack
from toughen.errors import InputError
from toughen.methods.wrapper import Wrapper
from toughen.objectives import METHODS, Live, Method, Objective


@dataclass(frozen=True)
class Stack:
    """Methods from inner to outer; made by ``stack``.

    Args:
        methods: At most one objective, which comes first, and the wrappers around it.

    Raises:
        InputError: Nothing to stack, an objective that is not the first, a method or a variant of it named twice, a
            wrapper that misses its inner method, or two methods that don't go together.
    """

    methods: tuple[Objective | Wrapper, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError("the method list is empty; start it with an objective, for example pgd-at")
        for outer in self.methods[1:]:
            if isinstance(outer, Objective):
                raise InputError(
                    f"{outer.label} is an objective and must come first; {self.methods[0].label} stands there"
                )
        for number, method in enumerate(self.methods):
            if any(_alike(method, other) for other in self.methods[:number]):
                raise InputError(f"{method.label} stands twice in the stack; name it once")
        first = self.methods[0]
        if not isinstance(first, Objective) and first.needs_inner:
            raise InputError(
                f"{first.label} stands alone but {first.needs_inner}; put an objective before it, for example pgd-at"
            )
        for number, method in enumerate(self.methods):
            _check_pairs(method, self.methods[:number], self.methods[number + 1 :])
            method.check_stack(self.methods)

    @property
    def label(self) -> str:
        """The row label of the paper's tables, for example ``"PGD-AT + CLAT"``."""
        return " + ".join(method.label for method in self.methods)

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> Live:
        """Bind the whole stack to a model, for use in any training loop."""
        live: Live | None = None
        for method in self.methods:
            if isinstance(method, Objective):
                live = method.bind(model, attack=attack, seed=seed)
            else:
                live = method.bind(model, attack=attack, inner=live, seed=seed)
        assert live is not None
        return live


def _check_pairs(method: Method, inner: Sequence[Method], outer: Sequence[Method]) -> None:
    """Apply the rules that stand on the class of ``method``; a rule for ``clat`` holds for its variants too."""
    for name, reason in method.conflicts.items():
        for other in (*inner, *outer):
            if _is(other, name):
                raise InputError(f"{method.label} does not go with {other.label}: {reason}")
    for name, reason in method.before.items():
        for other in inner:
            if _is(other, name):
                raise InputError(f"{method.label} stands behind {other.label}: {reason}; put it before")


def _alike(method: Method, other: Method) -> bool:
    """Whether one is the other or a variant of it, as ``clat-paper`` is of ``clat``."""
    return isinstance(method, type(other)) or isinstance(other, type(method))


def _is(method: Method, name: str) -> bool:
    return name in METHODS and isinstance(method, METHODS[name])  # type: ignore[arg-type]  # every entry is a class


def stack(*methods: Objective | Wrapper) -> Stack:
    """Compose methods, inner to outer; see ``Stack``."""
    return Stack(methods)
