"""Pre-activation ResNet-18 (He et al., 2016b) for small images, as adversarial training uses it.

It is the network of Rice et al. (2020): that of github.com/kuangliu/pytorch-cifar, whose projections take
the activated input and have no batch norm, with a last batch norm and ReLU before pooling. The main
path runs before the shortcut, so that the 20 convolutions are numbered as in ``resnet18``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions, stage


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.shortcut = nn.Sequential()  # empty: the identity, of the raw input
        if stride != 1 or channels_in != channels_out:
            self.shortcut.append(conv1x1(channels_in, channels_out, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        activated = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (self.shortcut(activated) if len(self.shortcut) else x)


class PreActResNet(nn.Module):
    """Stem, four stages of two blocks at ``width * (1, 2, 4, 8)`` channels, global average, classifier."""

    def __init__(self, *, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.channels, width)
        self.layer1 = stage(PreActBlock, width, width, stride=1)
        self.layer2 = stage(PreActBlock, width, 2 * width, stride=2)
        self.layer3 = stage(PreActBlock, 2 * width, 4 * width, stride=2)
        self.layer4 = stage(PreActBlock, 4 * width, 8 * width, stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(global_average(F.relu(self.bn(out))))
        return logits


@MODELS.register("preact_resnet18")
def preact_resnet18(*, num_classes: int, normalize: Normalize, width: int = 64) -> PreActResNet:
    """Build pre-activation ResNet-18: 20 convolutions, 11.2 million parameters at width 64."""
    return PreActResNet(num_classes=num_classes, normalize=normalize, width=width)
