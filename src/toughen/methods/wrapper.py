"""The settings of a method that wraps another one."""

from typing import Protocol

from torch import nn

from toughen.attacks import Attack
from toughen.objectives import Live


class Wrapper(Protocol):
    """Settings, as a frozen dataclass, that bind to a model around an inner live method."""

    @property
    def label(self) -> str:
        """Its name in a row label of the paper's tables."""
        ...

    @property
    def needs_inner(self) -> str | None:
        """Why it can't stand alone, or None if it can."""
        ...

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> Live:
        """Bind these settings to a model."""
        ...
