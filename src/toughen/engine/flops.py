"""Floating-point operations of one training step, counted rather than timed."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from toughen.layers.taps import random_state_kept
from toughen.objectives import Live
from toughen.types import Batch


def flops_per_image(live: Live, batch: Batch) -> float:
    """Count the operations of perturbing, forward and backward, per image.

    Counts matrix products and convolutions, on a copy, so the run itself is not touched.

    Args:
        live: The bound method.
        batch: A few images; the count per image does not depend on how many. Replays count.
    """
    twin = deepcopy(live)
    with random_state_kept(twin.model):
        twin.on(batch)  # what a first step looks up is no part of the others
        with OperationCounter() as counter:
            torch.autograd.backward(twin.on(batch).loss)
    return float(counter.total) * live.replays / len(batch.x)


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves this class untyped
    """Sums torch's own formulas. Its ``FlopCounterMode`` hooks modules, which ``autograd.grad`` on an image refuses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
