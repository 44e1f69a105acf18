"""RaWRN-70-16 (Peng et al., 2023): a SiLU wide ResNet after their robust principles.

Three stages of 30, 31 and 10 blocks at 216, 432 and 864 channels (``width * (1, 2, 4)``) follow a stem of 96
(``width * 4 / 9``, rounded); a squeeze-and-excitation of ratio 1/4 rescales what each block adds to its shortcut. The
rest is ``silu_wide_resnet``. Attribute names are those of github.com/poloclub/robust-principles.

The two 1x1 convolutions of a squeeze-and-excitation are layers too: of 288 convolutions 142 are such, numbered after
``conv_1`` and before ``shortcut`` of their block. They have one number per channel, so a measure that is divided by
the size of the feature favours them; ``exclude=("*.se.*",)`` of ``map_layers`` leaves the 146 of the wide ResNet.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.silu_wide_resnet import SiluBlock, SiluWideResNet
from toughen.models.stages import global_average


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) that depends on the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to the same shape."""
        means = global_average(x)[:, :, None, None]
        gate: Tensor = self.fc2(F.relu(self.fc1(means)))
        return x * gate.sigmoid()


class SqueezedBlock(SiluBlock):
    """A ``SiluBlock`` whose residual passes through a squeeze-and-excitation of ratio 1/4."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, stride)
        self.se = SqueezeExcitation(channels_out, max(1, round(channels_out / 4)))

    def residual(self, activated: Tensor) -> Tensor:
        """Return what the block adds to its shortcut."""
        out: Tensor = self.se(super().residual(activated))
        return out


@MODELS.register("rawrn70_16")
def rawrn70_16(*, num_classes: int, normalize: Normalize, width: int = 216) -> SiluWideResNet:
    """Build RaWRN-70-16: 288 convolutions, 267.2 million parameters at width 216."""
    return SiluWideResNet(
        SqueezedBlock,
        stem=max(1, round(width * 4 / 9)),
        widths=(width, 2 * width, 4 * width),
        depths=(30, 31, 10),
        num_classes=num_classes,
        normalize=normalize,
    )
