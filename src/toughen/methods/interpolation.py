"""The straight line between two states of one network, and how accurate the networks on it are."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toughen.attacks import Attack
from toughen.errors import InputError
from toughen.rng import generator
from toughen.types import Batches

ALPHAS = tuple(number / 10 for number in range(11))


class Interpolation(NamedTuple):
    """One network on the line.

    Attributes:
        alpha: Its share of the end, in [0, 1].
        clean: Its accuracy on clean images, in [0, 1].
        robust: Share of images that it gets right, clean and under the attack, in [0, 1].
    """

    alpha: float
    clean: float
    robust: float


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) * start + alpha * end of two states, batch-norm statistics included.

    Args:
        start: Tensors by name.
        end: Others of the same names and shapes. What is not a float, as counters, is theirs unless alpha is 0.
        alpha: In [0, 1]; 0 and 1 give back the tensors themselves, bit for bit.
    """
    if alpha in (0.0, 1.0):
        return dict(end if alpha else start)
    return {
        name: torch.lerp(start[name], value, alpha) if value.is_floating_point() else value
        for name, value in end.items()
    }


def measure_path(
    network: nn.Module, start: Mapping[str, Tensor], images: Batches, attack: Attack, *, seed: int = 0
) -> tuple[Interpolation, ...]:
    """Measure the networks at alpha = 0, 0.1, ..., 1 on the line from ``start`` to the state that ``network`` has.

    Args:
        network: In eval mode; holds the last of them afterwards, which has the state that it came with.
        start: The state at alpha = 0.
        images: (x, y) pairs, read once.
        attack: Against each of them; its random starts are the same for all.
        seed: Of the random starts.

    Raises:
        InputError: There are no images.
    """
    end = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    device = next(network.parameters()).device
    clean, robust, count = dict.fromkeys(ALPHAS, 0), dict.fromkeys(ALPHAS, 0), 0
    for number, (x, y, *_) in enumerate(images):
        x, y = x.to(device), y.to(device)  # noqa: PLW2901
        count += len(y)
        for alpha in ALPHAS:
            network.load_state_dict(interpolated(start, end, alpha))
            draw = generator(seed, "interpolation", number, device=device)
            right = _right(network, x, y)
            stands = right & _right(network, attack(network, x, y, generator=draw), y)
            clean[alpha] += int(right.sum())
            robust[alpha] += int(stands.sum())
    if not count:
        raise InputError("no held-out images to choose on; set data.validation, for example 1000")
    return tuple(Interpolation(alpha, clean[alpha] / count, robust[alpha] / count) for alpha in ALPHAS)


def _right(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = network(x).argmax(dim=1) == y
    return right
