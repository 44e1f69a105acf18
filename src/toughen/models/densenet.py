"""DenseNet-121 (Huang et al., 2017) with the stem for small images: 3x3, stride 1, no norm and no max-pooling.

Four dense blocks of 6, 12, 24 and 16 layers; each layer adds ``width / 2`` channels (the growth rate) to a stem of
``width``, and a transition between two blocks halves channels and sides. The 120 convolutions are numbered
``conv1`` 0, ``dense1.0.conv1`` 1, ``dense1.0.conv2`` 2, ..., ``trans1.conv`` 13, ``dense2.0.conv1`` 14, ...,
``dense3.0.conv1`` 39, ..., ``dense4.0.conv1`` 88, ..., ``dense4.15.conv2`` 119.

Attribute names are those of github.com/kuangliu/pytorch-cifar. As there, a layer puts its new channels before those
it was given; the publication puts them after. Initial weights keep the size of features, not of gradients.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions


class DenseLayer(nn.Module):
    """A 1x1 bottleneck of four times the growth rate and a 3x3 convolution, each after its batch norm and ReLU."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv1x1(channels_in, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, growth + channels_in, H, W]; the new channels come first."""
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], dim=1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution to fewer channels, and the average of each 2x2 square."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = conv1x1(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/2, W/2] (rounded down)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Stem, four dense blocks with transitions between them, batch norm, global average, classifier."""

    def __init__(self, depths: Sequence[int], *, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        growth = width // 2
        before, after = [width], []  # channels at both ends of each dense block
        for depth in depths:
            after.append(before[-1] + depth * growth)
            before.append(after[-1] // 2)
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.channels, width)
        self.dense1 = _dense_block(before[0], growth, depths[0])
        self.trans1 = Transition(after[0], before[1])
        self.dense2 = _dense_block(before[1], growth, depths[1])
        self.trans2 = Transition(after[1], before[2])
        self.dense3 = _dense_block(before[2], growth, depths[2])
        self.trans3 = Transition(after[2], before[3])
        self.dense4 = _dense_block(before[3], growth, depths[3])
        self.bn = nn.BatchNorm2d(after[3])
        self.linear = nn.Linear(after[3], num_classes)
        # fan_out, which the authors use, lets features grow in each layer until batch norm knows their size: the logits
        # of a fresh network in eval mode, as attacks see it, would be in the hundreds of thousands.
        init_convolutions(self, fan="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1], sides of at least 8, to logits [B, num_classes]."""
        out = self.trans1(self.dense1(self.conv1(self.normalize(x))))
        out = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(out)))))
        logits: Tensor = self.linear(global_average(F.relu(self.bn(out))))
        return logits


@MODELS.register("densenet121")
def densenet121(*, num_classes: int, normalize: Normalize, width: int = 64) -> DenseNet:
    """Build DenseNet-121 for small images: 120 convolutions, 6.96 million parameters at width 64.

    Raises:
        InputError: The width is odd.
    """
    if width % 2:
        raise InputError(f"width is {width}; densenet121 needs an even one, twice its growth rate: try {width + 1}")
    return DenseNet((6, 12, 24, 16), num_classes=num_classes, normalize=normalize, width=width)


def _dense_block(channels_in: int, growth: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(DenseLayer(channels_in + i * growth, growth) for i in range(depth)))
