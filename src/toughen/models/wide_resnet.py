"""Wide ResNets (Zagoruyko and Komodakis, 2016) in the form of TRADES, which AWP, MART and RST share.

WRN-d-k has a stem of 16 channels and three stages of ``(d - 4) / 6`` pre-activation blocks at ``16 * k * (1, 2, 4)``
channels, without dropout. ``width`` is ``16 * k``: 160 for WRN-28-10, 320 for WRN-34-20; the stem stays at 16. The
main path runs before the projection, so that the convolutions are numbered ``conv1`` 0, ``block1.layer.0.conv1`` 1,
``.conv2`` 2, ``.convShortcut`` 3, ...: d of them, since three are projections (two at width 16, where the first
stage has the channels of the stem).

Attribute names are those of github.com/yaodongyu/TRADES. Its weights may hold a ``sub_block1`` that no forward runs,
which is not built here, and they take images as they are: use ``mean`` 0 and ``std`` 1 with them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions, stage, under

STEM = 16  # channels, whatever the width


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU, beside a shortcut.

    Where the shape changes, the shortcut projects the activated input; elsewhere it is the raw input.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or channels_in != channels_out:
            self.convShortcut = conv1x1(channels_in, channels_out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        activated = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(nn.Module):
    """Stem, three stages of blocks at ``width * (1, 2, 4)`` channels, batch norm, global average, classifier."""

    def __init__(self, *, depth: int, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.normalize = normalize
        self.conv1 = conv3x3(normalize.channels, STEM)
        self.block1 = under("layer", stage(WideBlock, STEM, width, stride=1, blocks=blocks))
        self.block2 = under("layer", stage(WideBlock, width, 2 * width, stride=2, blocks=blocks))
        self.block3 = under("layer", stage(WideBlock, 2 * width, 4 * width, stride=2, blocks=blocks))
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        logits: Tensor = self.fc(global_average(F.relu(self.bn1(out))))
        return logits


@MODELS.register("wrn28_10")
def wrn28_10(*, num_classes: int, normalize: Normalize, width: int = 160) -> WideResNet:
    """Build WRN-28-10: 28 convolutions, 36.5 million parameters at width 160."""
    return WideResNet(depth=28, num_classes=num_classes, normalize=normalize, width=width)


@MODELS.register("wrn34_10")
def wrn34_10(*, num_classes: int, normalize: Normalize, width: int = 160) -> WideResNet:
    """Build WRN-34-10: 34 convolutions, 46.2 million parameters at width 160."""
    return WideResNet(depth=34, num_classes=num_classes, normalize=normalize, width=width)


@MODELS.register("wrn70_16")
def wrn70_16(*, num_classes: int, normalize: Normalize, width: int = 256) -> WideResNet:
    """Build WRN-70-16: 70 convolutions, 266.8 million parameters at width 256."""
    return WideResNet(depth=70, num_classes=num_classes, normalize=normalize, width=width)
