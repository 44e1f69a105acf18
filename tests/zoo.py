"""Small networks, each nasty in one way: [B, 3, 8, 8] images go in, [B, 4] logits come out."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConvConfig

from toughen import models

NUM_CLASSES = 4
IMAGE = (3, 8, 8)
FOREIGN_IMAGE = (3, 32, 32)


def images(count: int = 4, *, seed: int = 0, size: tuple[int, int, int] = IMAGE) -> tuple[Tensor, Tensor]:
    """Random images, away from the edges of the box so that a small ball fits into it, and labels."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.2 + 0.6 * torch.rand(count, *size, generator=draw)
    return x, torch.randint(NUM_CLASSES, (count,), generator=draw)


def build(name: str, *, seed: int = 0) -> nn.Module:
    """One network of the zoo with weights of its own seed, in train mode; batch norm has seen some data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {**ZOO, **RESTLESS, **FOREIGN}[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter)  # some classifiers start at zero, where no attack has a gradient
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(8, *(FOREIGN_IMAGE if name in FOREIGN else IMAGE)))
    return model


class Head(nn.Module):
    """Average over the image, then a linear classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


class Nested(nn.Module):
    """Layers three levels deep, with containers in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.ReLU())
        self.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)])})
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.blocks["a"]:
            x = F.gelu(conv(x))
        return self.head(x)


class CalledTwice(nn.Module):
    """One convolution that a forward runs twice, and that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.again
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.alias(torch.tanh(self.again(self.first(x))))))


class Tied(nn.Module):
    """Two layers that own the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight
        self.head = Head(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(x))))


class Unused(nn.Module):
    """A layer that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.spare = nn.Conv2d(4, 4, 3)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)))


class Backwards(nn.Module):
    """Layers registered last-first, run first-last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(6)
        self.third = nn.Conv2d(5, 6, 3)
        self.second = nn.Conv2d(4, 5, 3)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.third(F.relu(self.second(F.relu(self.first(x)))))))


class InPlace(nn.Module):
    """A ReLU that overwrites what the convolution returned, and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        y = self.mix(x)
        y += x
        return self.head(y)


class PairConv(nn.Conv2d):
    """A convolution that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out.mean()


class TupleOutput(nn.Module):
    """A layer that does not return one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pair = PairConv(4, 4, 3)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        out, mean = self.pair(F.relu(self.conv(x)))
        return self.head(out) + mean


class Attention(nn.Module):
    """Multi-head attention, whose output projection owns weights but is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.fc(tokens.mean(dim=1))


class Functional(nn.Module):
    """Branches, concatenation and pooling without modules, and a weight used by a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 2, 1)
        self.kernel = nn.Parameter(0.3 * torch.randn(4, 6, 3, 3))
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), self.right(x).sigmoid()], dim=1)
        x = F.max_pool2d(x, 2)
        return self.head(F.conv2d(x, self.kernel, padding=1).clamp(min=-1.0))


class Dropouts(nn.Module):
    """Dropout as a module and as a function of the training flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout2d(0.5)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(self.drop(F.relu(self.conv(x)))))
        return self.head(F.dropout(x, 0.3, training=self.training))


class Normed(nn.Module):
    """Batch norm behind one convolution, and behind an activation, so that it follows no layer directly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 5, 3, padding=1)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(F.relu(self.conv2(x)))
        return self.head(F.relu(self.conv3(x)))


class ByKeyword(nn.Module):
    """Layers that get their input as a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(input=self.conv(input=x)))
        return self.fc(input=x.mean(dim=(2, 3)))


class TokensFirst(nn.Module):
    """A linear layer whose first dimension is the position, not the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)  # [T, B, 8]
        return self.fc(self.mix(tokens).relu().mean(dim=0))


class TokenPool(nn.Module):
    """Takes [T, B, 8], returns [B, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.b(self.a(tokens.mean(dim=0)).relu())


class PoolsTokens(nn.Module):
    """A block whose input has the positions first, and whose output has the samples first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.pool = TokenPool()
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.patches(x).flatten(2).permute(2, 0, 1)))


class Windowed(nn.Module):
    """A linear layer on [B * 4, 4, 6]: windows of an image as further samples, each image's windows in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def windows(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] to [B, 4, 4, 6]: window, patch, channel."""
        squares = self.patches(x).unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 6, 2, 2, 2, 2]
        return squares.flatten(4).flatten(2, 3).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.windows(x).flatten(0, 1)).relu_()
        return self.fc(mixed.unflatten(0, (len(x), -1)).mean(dim=(1, 2)))


class WindowsFirst(Windowed):
    """The same in another order: the first window of each image, then the second of each."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.windows(x).transpose(0, 1).flatten(0, 1)).relu()
        return self.fc(mixed.unflatten(0, (-1, len(x))).mean(dim=(0, 2)))


class QueriesFirst(nn.Module):
    """A linear layer on [T, B, 6] whose first half of positions is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.queries = nn.Parameter(torch.randn(4, 1, 6))
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)  # [4, B, 6]
        tokens = torch.cat([self.queries.expand(-1, len(x), -1), tokens])
        return self.fc(self.mix(tokens).relu().mean(dim=0))


class SharedNorm(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.head(F.relu(self.bn(self.conv2(x))))


class Noisy(nn.Module):
    """Draws from torch's global random state in eval mode too, as smoothed classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x + 0.01 * torch.randn_like(x))))


class Counting(nn.Module):
    """Changes buffers in eval mode too: one in place, one by putting a new tensor in its place."""

    calls: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + len(x)
        return self.head(F.relu(self.conv(x)))


def small_resnet18() -> nn.Module:
    return models.create("resnet18", num_classes=NUM_CLASSES, width=4)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "nested": Nested,
    "called_twice": CalledTwice,
    "tied": Tied,
    "unused": Unused,
    "backwards": Backwards,
    "in_place": InPlace,
    "tuple_output": TupleOutput,
    "attention": Attention,
    "functional": Functional,
    "dropouts": Dropouts,
    "normed": Normed,
    "by_keyword": ByKeyword,
    "tokens_first": TokensFirst,
    "pools_tokens": PoolsTokens,
    "windowed": Windowed,
    "windows_first": WindowsFirst,
    "queries_first": QueriesFirst,
    "shared_norm": SharedNorm,
    "resnet18": small_resnet18,
}

# Not functions of the image alone, even in eval mode: only "left as found" can be asked of them.
RESTLESS: dict[str, Callable[[], nn.Module]] = {"noisy": Noisy, "counting": Counting}
EVERY = [*ZOO, *RESTLESS]

TOKENS: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "num_heads": 2}
WINDOWS: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}

# Small variants of networks that are not ours, for [B, 3, 32, 32].
FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=NUM_CLASSES, depths=(1, 2, 1, 1), dims=(8, 8, 16, 16)
    ),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, **TOKENS, depth=2),
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=NUM_CLASSES, **TOKENS, depth=1
    ),
    "mixer": lambda: MlpMixer(num_classes=NUM_CLASSES, img_size=32, patch_size=16, num_blocks=2, embed_dim=16),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=NUM_CLASSES, **WINDOWS),
    "swinv2": lambda: timm.create_model("swinv2_cr_tiny_224", num_classes=NUM_CLASSES, **WINDOWS),
    "efficientnet": lambda: EfficientNet(
        decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.5"], ["ir_r2_k3_s2_e2_c8_se0.5"]]),
        num_classes=NUM_CLASSES,
        stem_size=8,
        num_features=16,
    ),
    "regnet": lambda: RegNet(
        RegNetCfg(depth=6, w0=8, wa=12.0, wm=2.0, group_size=8, se_ratio=0.5), num_classes=NUM_CLASSES
    ),
    "torchvision_densenet": lambda: torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=NUM_CLASSES
    ),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=NUM_CLASSES
    ),
    "torchvision_efficientnet": lambda: torchvision.models.EfficientNet(
        [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 16, 2)],
        dropout=0.1,
        last_channel=16,
        num_classes=NUM_CLASSES,
    ),
}
