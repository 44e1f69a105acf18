"""VGG-19 (Simonyan and Zisserman, 2015) for small images: batch norm, and one linear classifier.

Five stages of 2, 2, 4, 4 and 4 convolutions at ``width * (1, 2, 4, 8, 8)`` channels, each stage before a 2x2
max-pooling. The 16 convolutions are numbered in order, ``features.0`` 0, ``features.3`` 1, ``features.7`` 2, ...,
``features.49`` 15, and have a bias although batch norm follows, as in github.com/kuangliu/pytorch-cifar, whose
attribute names these are.

It differs from the publication by its batch norm and by its classifier, which had three layers and dropout.
"""

from torch import Tensor, nn

from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.stages import global_average, init_convolutions


class VGG(nn.Module):
    """Stages of convolution, batch norm and ReLU, each before max-pooling; global average; classifier."""

    def __init__(self, depths: tuple[int, ...], *, num_classes: int, normalize: Normalize, width: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.features = nn.Sequential()
        channels = normalize.channels
        for depth, times in zip(depths, (1, 2, 4, 8, 8), strict=True):
            for _ in range(depth):
                self.features.append(nn.Conv2d(channels, times * width, kernel_size=3, padding=1))
                self.features.append(nn.BatchNorm2d(times * width))
                self.features.append(nn.ReLU())
                channels = times * width
            # Rounding up changes nothing at 32x32 and lets five poolings take images of any size.
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.classifier = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        logits: Tensor = self.classifier(global_average(self.features(self.normalize(x))))
        return logits


@MODELS.register("vgg19")
def vgg19(*, num_classes: int, normalize: Normalize, width: int = 64) -> VGG:
    """Build VGG-19 for small images: 16 convolutions, 20.0 million parameters at width 64."""
    return VGG((2, 2, 4, 4, 4), num_classes=num_classes, normalize=normalize, width=width)
