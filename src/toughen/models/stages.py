"""What the convolutional families share: convolutions, stages of blocks, pooling, initial weights."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn


def conv3x3(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Conv2d:
    """Return a padded 3x3 convolution without bias (batch norm has one)."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias: a projection, or a bottleneck."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], channels_in: int, channels_out: int, *, stride: int, blocks: int = 2
) -> nn.Sequential:
    """Stack ``blocks`` blocks ``block(channels_in, channels_out, stride)``; the first one changes the shape."""
    first = block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def under(name: str, module: nn.Module) -> nn.Sequential:
    """Hold ``module`` under ``name``: public weight names have a level that computes nothing."""
    return nn.Sequential(OrderedDict({name: module}))


def global_average(features: Tensor) -> Tensor:
    """Average [B, C, H, W] over the image, to [B, C]: any image size fits the classifier."""
    return features.mean(dim=(2, 3))


def init_convolutions(model: nn.Module, *, fan: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Draw the convolutions' weights after He et al. (2015): normal, variance ``2 / fan``.

    Batch norms start at (1, 0); the linear classifier and biases as torch draws them.

    Args:
        model: Its ``Conv2d`` modules are drawn, in order of definition.
        fan: ``"fan_in"`` keeps the size of features from layer to layer, ``"fan_out"`` that of gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
