"""Wide ResNets with SiLU, the form of Gowal et al. (2020), Rebuffi et al. (2021) and Wang et al. (2023).

They compute what ``wide_resnet`` does, with SiLU for ReLU, batch-norm momentum 0.01 (the weight of the newest batch),
and a 3x3 convolution of stride 2 that pads an even side at its end only. Convolutions are numbered as there,
``init_conv`` 0, ``layer.0.block.0.conv_0`` 1, ``.conv_1`` 2, ``.shortcut`` 3, ...; ``width`` is again 16 times the
widening factor, beside a stem of 16 channels.

Attribute names are those of the authors' PyTorch code, which RobustBench has as ``dm_wide_resnet``. That code fails
on images with an odd side; here such a side is padded at both ends, as the "SAME" padding of the original JAX code is.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import conv1x1, conv3x3, global_average, init_convolutions, stage, under
from toughen.models.wide_resnet import STEM


class SiluBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and SiLU, beside a shortcut.

    Where the shape changes, the shortcut projects the activated input; elsewhere it is the raw input.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = _batch_norm(channels_in)
        self.conv_0 = nn.Conv2d(
            channels_in, channels_out, kernel_size=3, stride=stride, padding=1 if stride == 1 else 0, bias=False
        )
        self.batchnorm_1 = _batch_norm(channels_out)
        self.conv_1 = conv3x3(channels_out, channels_out)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = conv1x1(channels_in, channels_out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels_in, H, W] to [B, channels_out, H/stride, W/stride] (rounded up)."""
        activated = F.silu(self.batchnorm_0(x))
        out = self.residual(activated)
        return out + (x if self.shortcut is None else self.shortcut(activated))

    def residual(self, activated: Tensor) -> Tensor:
        """Return what the block adds to its shortcut."""
        padded = activated if self.stride == 1 else _pad_same(activated)
        out: Tensor = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(padded))))
        return out


class SiluWideResNet(nn.Module):
    """Stem, three stages of blocks, batch norm, global average, classifier.

    Args:
        block: Builds a block from its channels in, channels out and stride.
        stem: Channels of the first convolution.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        num_classes: Number of logits.
        normalize: Becomes the first submodule.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        *,
        stem: int,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int,
        normalize: Normalize,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.init_conv = conv3x3(normalize.channels, stem)
        shapes = zip((stem, *widths[:-1]), widths, (1, 2, 2), depths, strict=True)
        self.layer = nn.Sequential(
            *(under("block", stage(block, c_in, c_out, stride=stride, blocks=n)) for c_in, c_out, stride, n in shapes)
        )
        self.batchnorm = _batch_norm(widths[-1])
        self.logits = nn.Linear(widths[-1], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        out = self.layer(self.init_conv(self.normalize(x)))
        logits: Tensor = self.logits(global_average(F.silu(self.batchnorm(out))))
        return logits


@MODELS.register("wrn28_10_silu")
def wrn28_10_silu(*, num_classes: int, normalize: Normalize, width: int = 160) -> SiluWideResNet:
    """Build WRN-28-10 with SiLU: 28 convolutions, 36.5 million parameters at width 160."""
    return _wide_resnet(28, num_classes, normalize, width)


@MODELS.register("wrn34_10_silu")
def wrn34_10_silu(*, num_classes: int, normalize: Normalize, width: int = 160) -> SiluWideResNet:
    """Build WRN-34-10 with SiLU: 34 convolutions, 46.2 million parameters at width 160."""
    return _wide_resnet(34, num_classes, normalize, width)


@MODELS.register("wrn70_16_silu")
def wrn70_16_silu(*, num_classes: int, normalize: Normalize, width: int = 256) -> SiluWideResNet:
    """Build WRN-70-16 with SiLU: 70 convolutions, 266.8 million parameters at width 256."""
    return _wide_resnet(70, num_classes, normalize, width)


def _wide_resnet(depth: int, num_classes: int, normalize: Normalize, width: int) -> SiluWideResNet:
    return SiluWideResNet(
        SiluBlock,
        stem=STEM,
        widths=(width, 2 * width, 4 * width),
        depths=((depth - 4) // 6,) * 3,
        num_classes=num_classes,
        normalize=normalize,
    )


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=0.01)


def _pad_same(x: Tensor) -> Tensor:
    """Pad [B, C, H, W] for a 3x3 convolution of stride 2: an odd side at both ends, an even one at its end alone."""
    height, width = x.shape[2:]
    return F.pad(x, (width % 2, 1, height % 2, 1))
