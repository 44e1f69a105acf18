"""What an attack costs, counted where the model is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Count:
    """Images that a model was shown, and images for which a gradient was computed."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0


@contextmanager
def counted(model: nn.Module) -> Iterator[Count]:
    """Count inside the ``with`` what passes through the model, forwards that stop early included."""
    count = Count()

    def backward(gradient: Tensor) -> None:
        count.backwards += len(gradient)

    def forward(_: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        count.forwards += len(x)
        if x.requires_grad:
            x.register_hook(backward)

    handle = model.register_forward_pre_hook(forward)
    try:
        yield count
    finally:
        handle.remove()
