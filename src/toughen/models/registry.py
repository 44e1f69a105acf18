"""Models by name, and the one function that builds them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from toughen.errors import InputError
from toughen.models.normalize import Normalize
from toughen.registry import Registry
from toughen.rng import stream_seed

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


class Builder(Protocol):
    """A function that builds one architecture; its default ``width`` is that of the published network."""

    def __call__(self, *, num_classes: int, normalize: Normalize, width: int = ...) -> nn.Module:
        """Build the network with ``normalize`` as its first submodule; the stem takes its channels."""


MODELS: Registry[Builder] = Registry("model")


def create(
    name: str,
    *,
    num_classes: int = 10,
    width: int | None = None,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a classifier: images in [0, 1] go in, logits come out; it normalises inside.

    Args:
        name: A key of ``MODELS``.
        num_classes: Number of logits, at least 2.
        width: Channels of the first stage; the others are multiples of it. None is the published
            network's (64 for the ResNets, 16 for ``small_cnn``).
        in_channels: Channels of the images.
        mean: Channel means for the ``Normalize`` layer, in [0, 1]. None is CIFAR-10's for three
            channels and 0.5 for any other number.
        std: Channel standard deviations; None as for ``mean``.
        seed: Draws the initial weights from the stream ``"init"`` and leaves torch's global random
            state as it was. None draws them from the global state, as ``nn.Module`` does.

    Returns:
        The model, in training mode, with ``normalize`` as its first submodule. With a seed it is on
        the CPU whatever the default device, so that the weights are the same on every machine.

    Raises:
        InputError: Unknown name, or a size or statistic that no model can have.

    Example:
        >>> create("small_cnn", in_channels=1, seed=0)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    build = MODELS[name]
    if num_classes < 2:
        raise InputError(f"num_classes is {num_classes}; a classifier needs at least 2")
    if width is not None and width < 1:
        raise InputError(f"width is {width}; the first stage needs at least 1 channel")
    if in_channels < 1:
        raise InputError(f"in_channels is {in_channels}; images have at least 1 channel")
    normalize = Normalize(
        _per_channel("mean", mean, CIFAR10_MEAN, in_channels),
        _per_channel("std", std, CIFAR10_STD, in_channels),
    )
    with _initial_weights(seed):
        if width is None:
            return build(num_classes=num_classes, normalize=normalize)
        return build(num_classes=num_classes, normalize=normalize, width=width)


def _per_channel(
    what: str, given: Sequence[float] | None, cifar10: Sequence[float], in_channels: int
) -> Sequence[float]:
    if given is None:
        return cifar10 if in_channels == len(cifar10) else (0.5,) * in_channels
    if len(given) != in_channels:
        raise InputError(f"{what} has {len(given)} numbers; in_channels={in_channels} needs {in_channels}")
    return given


@contextmanager
def _initial_weights(seed: int | None) -> Iterator[None]:
    """Inside, module constructors draw from the stream ``"init"`` of ``seed``, if one is given."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that reseeds the CUDA generators too, which the fork does not restore.
        torch.default_generator.manual_seed(stream_seed(seed, "init"))
        yield
