"""ResNet-18 (He et al., 2016) with the stem for small images: 3x3, stride 1, no max-pooling.

In each block the main path runs before the shortcut, so that the order of execution numbers the 20
convolutions ``conv1`` 0, ``layer1.0.conv1`` 1, ..., ``layer2.0.conv2`` 6, ``layer2.0.shortcut.0`` 7, ...,
``layer4.1.conv2`` 19. Attribute names are those of github.com/kuangliu/pytorch-cifar.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions, stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, beside a shortcut; projected where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()  # empty: the identity
        if stride != 1 or channels_in != channels_out:
            self.shortcut.append(conv1x1(channels_in, channels_out, stride=stride))
            self.shortcut.append(nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages of two blocks at ``width * (1, 2, 4, 8)`` channels, global average, classifier."""

    def __init__(self, *, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(BasicBlock, width, width, stride=1)
        self.layer2 = stage(BasicBlock, width, 2 * width, stride=2)
        self.layer3 = stage(BasicBlock, 2 * width, 4 * width, stride=2)
        self.layer4 = stage(BasicBlock, 4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)
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
    return ResNet(num_classes=num_classes, normalize=normalize, width=width)
