"""A plain network of six convolutions for small or grey images, such as the embedded 8x8 digits."""

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv3x3, global_average, init_convolutions, stage


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch norm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels_in, channels_out, stride=stride)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        return F.relu(self.bn(self.conv(x)))


class SmallCNN(nn.Module):
    """Three stages of two blocks at ``width * (1, 2, 4)`` channels, global average, classifier."""

    def __init__(self, *, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.layer1 = stage(ConvBlock, normalize.channels, width, stride=1)
        self.layer2 = stage(ConvBlock, width, 2 * width, stride=2)
        self.layer3 = stage(ConvBlock, 2 * width, 4 * width, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        out = self.layer3(self.layer2(self.layer1(self.normalize(x))))
        logits: Tensor = self.linear(global_average(out))
        return logits


@MODELS.register("small_cnn")
def small_cnn(*, num_classes: int, normalize: Normalize, width: int = 16) -> SmallCNN:
    """Build the small network: 6 convolutions, 73 thousand parameters at width 16."""
    return SmallCNN(num_classes=num_classes, normalize=normalize, width=width)
