"""ResNet-18 and ResNet-50 (He et al., 2016) with the stem for small images: 3x3, stride 1, no max-pooling.

In each block the main path runs before the shortcut, so that the order of execution numbers the 20
convolutions of ResNet-18 ``conv1`` 0, ``layer1.0.conv1`` 1, ..., ``layer2.0.conv2`` 6, ``layer2.0.shortcut.0`` 7,
..., ``layer4.1.conv2`` 19, and the 53 of ResNet-50 ``conv1`` 0, ..., ``layer1.0.conv3`` 3, ``layer1.0.shortcut.0`` 4,
..., ``layer4.2.conv3`` 52. Attribute names are those of github.com/kuangliu/pytorch-cifar.

Beside the stem, it differs from the publication in the stride of a bottleneck, which is that of its 3x3 convolution.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions, stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, beside a shortcut; projected where the shape changes."""

    expansion = 1

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, at a quarter of the channels, beside the shortcut of ``BasicBlock``."""

    expansion = 4

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        channels = channels_out // self.expansion
        self.conv1 = conv1x1(channels_in, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages of blocks at ``width * expansion * (1, 2, 4, 8)`` channels, global average, classifier."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int,
        normalize: Normalize,
        width: int,
    ) -> None:
        super().__init__()
        wide = width * block.expansion
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(block, width, wide, stride=1, blocks=depths[0])
        self.layer2 = stage(block, wide, 2 * wide, stride=2, blocks=depths[1])
        self.layer3 = stage(block, 2 * wide, 4 * wide, stride=2, blocks=depths[2])
        self.layer4 = stage(block, 4 * wide, 8 * wide, stride=2, blocks=depths[3])
        self.linear = nn.Linear(8 * wide, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(global_average(out))
        return logits


@MODELS.register("resnet18")
def resnet18(*, num_classes: int, normalize: Normalize, width: int = 64) -> ResNet:
    """Build ResNet-18 for small images: 20 convolutions, 11.2 million parameters at width 64."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, normalize=normalize, width=width)


@MODELS.register("resnet50")
def resnet50(*, num_classes: int, normalize: Normalize, width: int = 64) -> ResNet:
    """Build ResNet-50 for small images: 53 convolutions, 23.5 million parameters at width 64."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, normalize=normalize, width=width)


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Return the identity (an empty sequence), or a projection with batch norm where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels_in, channels_out, stride=stride), nn.BatchNorm2d(channels_out))
