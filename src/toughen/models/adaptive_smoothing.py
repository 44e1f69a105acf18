"""Adaptive smoothing (Bai et al. 2024): an accurate and a robust network answer together, mixed by a weight alpha."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.attacks.probabilities import at_least_float32
from toughen.errors import InputError, first_line
from toughen.layers import ModelView, map_layers
from toughen.layers.taps import random_state_kept
from toughen.rng import stream_seed

Taps = tuple[str, ...]
Shape = tuple[int, int, int]

# The published code scales the normalised gamma by 2 and, while training, shifts it by 0.4.
_GAMMA_SCALE, _TRAIN_SHIFT = 2.0, 0.4
# How far a gamma may lie from the mean of its batch while training, in standard deviations.
_MOST_DEVIATION = 0.6
_WIDTH = 64
_FOR_LEARNED = ("alpha_range", "gamma_shift", "accurate_taps", "robust_taps")


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """How two networks are mixed.

    Args:
        alpha_range: Lowest and highest weight of the robust network when a learned mixture is used rather than
            trained, in [0, 1].
        gamma_shift: Added to the normalised gamma then; more means more images are treated as attacked.
        accurate_scale: Factor on the logits of the accurate network, above 0.
        robust_scale: Factor on the logits of the robust network, above 0.
        accurate_size: Side in pixels to which images are resized for the accurate network; None leaves them.
        accurate_taps: Qualified names of the accurate network's layers whose output the mixing network sees. None is
            the blocks after a third and two thirds of its depth.
        robust_taps: Likewise, of the robust network.

    Raises:
        InputError: A setting is out of its range.
    """

    alpha_range: tuple[float, float] = (0.84, 0.99)
    gamma_shift: float = 1.3
    accurate_scale: float = 1.0
    robust_scale: float = 1.0
    accurate_size: int | None = None
    accurate_taps: Taps | None = None
    robust_taps: Taps | None = None

    def __post_init__(self) -> None:
        low, high = self.alpha_range
        if not 0 <= low < high <= 1:
            raise InputError(
                f"alpha_range is {list(self.alpha_range)}; it must rise inside [0, 1], as [0.84, 0.99] does"
            )
        if not math.isfinite(self.gamma_shift):
            raise InputError(f"gamma_shift is {self.gamma_shift}; it must be a finite number")
        for name in ("accurate_scale", "robust_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        if self.accurate_size is not None and self.accurate_size < 1:
            raise InputError(f"accurate_size is {self.accurate_size}; images have sides of at least 1 pixel")
        for name in ("accurate_taps", "robust_taps"):
            names = getattr(self, name)
            if names is not None and len({*names}) != max(len(names), 1):
                raise InputError(f"{name} is {list(names)}; name at least one layer, and each once")


def mix(
    accurate: nn.Module,
    robust: nn.Module,
    *,
    alpha: float | Literal["learned"],
    image_shape: Shape | None = None,
    seed: int = 0,
    options: MixtureOptions | None = None,
) -> "SmoothedMixture":
    """Mix an accurate and a robust network; see ``SmoothedMixture``.

    Args:
        accurate: g: images in [0, 1] go in, logits come out. Used as it is, not copied, and put into eval mode.
        robust: h, likewise.
        alpha: Weight of h, in [0, 1], or ``"learned"`` for one that a mixing network gives to each image; it is
            trained by the objective ``adaptive-smoothing``.
        image_shape: Channels, height and width; where given, both networks are tried on such an image. A learned
            alpha needs it.
        seed: Of the mixing network's initial weights.
        options: Scales, ranges and layers.

    Raises:
        InputError: ``alpha`` is outside of [0, 1], a network does not take the images, the two have other classes, or
            a tapped layer has no feature.

    Example:
        >>> from toughen.models import create
        >>> mix(create("small_cnn"), create("small_cnn"), alpha=0.5)(torch.rand(2, 3, 8, 8)).exp().sum(dim=1)
        tensor([1., 1.], grad_fn=<SumBackward1>)
    """
    if alpha != "learned" and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise InputError(f"alpha is {alpha!r}; it must be a number in [0, 1], or 'learned'")
    if alpha == "learned" and image_shape is None:
        raise InputError(
            "a learned alpha needs image_shape=(channels, height, width), to look at the networks' features"
        )
    options = options or MixtureOptions()
    for name in _FOR_LEARNED:
        if alpha != "learned" and getattr(options, name) != getattr(MixtureOptions, name):
            raise InputError(
                f"{name} is {getattr(options, name)}, which means nothing for a constant alpha; leave it out"
            )
    mixture = SmoothedMixture(accurate, robust, alpha if alpha == "learned" else float(alpha), options)
    if image_shape is not None:
        mixture.fit_to(image_shape, seed=seed)
    return mixture


class Mixed(NamedTuple):
    """What a mixture computes.

    Attributes:
        log_probabilities: [B, K], normalised.
        gamma: [B], the logit of alpha before it is brought into its range: above 0 means "attacked". None where alpha
            is constant.
    """

    log_probabilities: Tensor
    gamma: Tensor | None


class SmoothedMixture(nn.Module):
    """``log((1 - alpha) softmax(s_g g(x)) + alpha softmax(s_h h(x)))``, of an accurate network g and a robust one h.

    What comes out are log-probabilities; as logits they give the same cross-entropy, while losses on differences of
    logits (margin, DLR) see other numbers than of a network that ends in a linear layer. A constant alpha of 0 or 1 is
    the log-softmax of one network alone, and the other one does not run.

    A learned alpha is ``sigmoid(gamma)``, with ``gamma = 2 BN(m(features)) + shift`` of a mixing network m that sees
    features of both networks; gradients flow through it. In train mode outliers are clamped to 0.6 standard deviations
    around the mean of the batch before the batch norm, and alpha is in (0, 1); in eval mode it is brought into
    ``alpha_range``.

    Both networks are in eval mode, whatever mode the mixture is in. ``mix`` makes one, and explains the arguments.
    """

    def __init__(
        self, accurate: nn.Module, robust: nn.Module, alpha: float | Literal["learned"], options: MixtureOptions
    ) -> None:
        super().__init__()
        self.accurate, self.robust, self.options = accurate.eval(), robust.eval(), options
        self.alpha = alpha
        self.taps: tuple[Taps, Taps] = (), ()
        self.mixing: MixingNetwork | None = None

    def fit_to(self, image_shape: Shape, *, seed: int) -> None:
        """Try both networks on a grey image; where alpha is learned, make a mixing network for the features seen there.

        Raises:
            InputError: See ``mix``.
        """
        place = next(self.robust.parameters(), torch.empty(0))
        grey = torch.full((2, *image_shape), 0.5, device=place.device, dtype=place.dtype)
        given = self.options.accurate_taps, self.options.robust_taps
        learned = self.alpha == "learned"
        with torch.no_grad(), random_state_kept(self):
            seen = [
                _seen(*pair, names if learned else ()) for pair, names in zip(self._inputs(grey), given, strict=True)
            ]
        _check_classes(*(logits.shape[1] for _, logits in seen))
        if learned:
            self.taps = tuple(seen[0][0]), tuple(seen[1][0])
            shapes = [feature.shape[1:] for features, _ in seen for feature in _maps(features)]
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.default_generator.manual_seed(stream_seed(seed, "mixing network"))
                self.mixing = MixingNetwork([(c, h, w) for c, h, w in shapes]).to(place)

    def train(self, mode: bool = True) -> "SmoothedMixture":
        """Put the mixing network into train or eval mode; g and h stay in eval mode."""
        super().train(mode)
        self.accurate.eval()
        self.robust.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to log-probabilities [B, K], of at least single precision."""
        return self.mixed(x).log_probabilities

    def mixed(self, x: Tensor, *, in_range: bool | None = None) -> Mixed:
        """Return the log-probabilities of images [B, C, H, W] and what decided their alpha.

        Args:
            x: Images, in [0, 1].
            in_range: Whether a learned alpha is brought into ``alpha_range``, as when the mixture is used, or kept in
                (0, 1), as when it is trained. None is by the mode.

        Raises:
            InputError: The two networks have other numbers of classes.
        """
        inputs, options = self._inputs(x), self.options
        scales = options.accurate_scale, options.robust_scale
        if self.alpha in (0, 1):
            only = int(self.alpha)
            network, images = inputs[only]
            return Mixed(_log_softmax(network(images), scales[only]), None)
        seen = [_features(*pair, names) for pair, names in zip(inputs, self.taps, strict=True)]
        g, h = (_log_softmax(logits, scale) for (_, logits), scale in zip(seen, scales, strict=True))
        _check_classes(g.shape[1], h.shape[1])
        if isinstance(self.alpha, float):
            return Mixed(torch.logaddexp(math.log1p(-self.alpha) + g, math.log(self.alpha) + h), None)
        assert self.mixing is not None
        in_range = not self.training if in_range is None else in_range
        normalised = self.mixing([feature for features, _ in seen for feature in _maps(features)])
        gamma = _GAMMA_SCALE * normalised.to(g.dtype) + (options.gamma_shift if in_range else _TRAIN_SHIFT)
        log_rest, log_alpha = _log_weights(gamma, *(options.alpha_range if in_range else (0.0, 1.0)))
        return Mixed(torch.logaddexp(log_rest[:, None] + g, log_alpha[:, None] + h), gamma)

    def _inputs(self, x: Tensor) -> tuple[tuple[nn.Module, Tensor], tuple[nn.Module, Tensor]]:
        """Each network with its images."""
        side = self.options.accurate_size
        resized = x if side is None else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        return (self.accurate, resized), (self.robust, x)

    def extra_repr(self) -> str:
        """Show the weight of the robust network when the model is printed."""
        return f"alpha in {self.options.alpha_range}" if self.alpha == "learned" else f"alpha={self.alpha}"


class MixingNetwork(nn.Module):
    """From features of both networks to one number per image: 1x1 projections, two 3x3 convolutions, an average.

    Args:
        shapes: Channels, height and width of each feature map. All are brought to the size of the largest one.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.size = max((shape[1:] for shape in shapes), key=math.prod)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, _WIDTH, 1, bias=False))
            for channels, _, _ in shapes
        )
        channels = _WIDTH * len(shapes)
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, _WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, _WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
        )
        self.linear = nn.Linear(_WIDTH, 1, bias=False)
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map features, each [B, C, H, W], to [B]: normalised, and clamped in train mode."""
        pairs = zip(self.projections, maps, strict=True)
        pooled = [F.adaptive_avg_pool2d(projection(feature), self.size) for projection, feature in pairs]
        score: Tensor = self.linear(self.body(torch.cat(pooled, dim=1)).mean(dim=(2, 3)))  # [B, 1]
        if self.training:
            known = score.detach()
            reach = _MOST_DEVIATION * known.std()
            score = torch.minimum(torch.maximum(score, known.mean() - reach), known.mean() + reach)
        normalised: Tensor = self.norm(score)
        return normalised.squeeze(1)


def _features(network: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return the outputs of these layers, in the order in which they run, and the logits."""
    features = ModelView(network).features(x, names)
    assert features.logits is not None
    return features.values, features.logits


def _seen(network: nn.Module, x: Tensor, names: Sequence[str] | None) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return the same for a network that is met for the first time, of its default layers where None are named."""
    try:
        return _features(network, x, _default_taps(network, x) if names is None else names)
    except InputError:
        raise
    except Exception as error:  # whatever a network says when its input does not suit it
        kind, size = type(network).__name__, f"{x.shape[3]}x{x.shape[2]} images with {x.shape[1]} channels"
        raise InputError(f"the network {kind} of a mixture does not take {size}: {first_line(error)}") from error


def _default_taps(network: nn.Module, example: Tensor) -> Taps:
    """Name the blocks after a third and two thirds of the network, which in wide ResNets end the first two stages."""
    blocks = [layer.name for layer in map_layers(network, example, granularity="blocks").selectable]
    if not blocks:
        raise InputError(
            f"{type(network).__name__} has no block whose output can be looked at; name its layers as taps"
        )
    return tuple(dict.fromkeys((blocks[len(blocks) // 3], blocks[2 * len(blocks) // 3])))


def _maps(features: Mapping[str, Tensor]) -> list[Tensor]:
    """Return features, in the order in which the network computes them, as maps [B, C, H, W]."""
    return [_as_map(name, feature) for name, feature in features.items()]


def _as_map(name: str, feature: Tensor) -> Tensor:
    """Take a vector [B, C] for a map of one position, and tokens [B, N, C] for one column of N."""
    if feature.dim() == 2:
        return feature[:, :, None, None]
    if feature.dim() == 3:
        return feature.transpose(1, 2)[..., None]
    if feature.dim() != 4:
        shape = list(feature.shape[1:])
        raise InputError(f"layer {name!r} returns features of shape {shape}; tap one with [C], [N, C] or [C, H, W]")
    return feature


def _log_softmax(logits: Tensor, scale: float) -> Tensor:
    return F.log_softmax(scale * at_least_float32(logits), dim=1)


def _log_weights(gamma: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return log(1 - alpha) and log alpha of ``alpha = low + (high - low) sigmoid(gamma)``, exact for any gamma."""
    yes, no = F.logsigmoid(gamma), F.logsigmoid(-gamma)
    log_alpha = torch.logaddexp(yes + _log(high), no + _log(low))
    log_rest = torch.logaddexp(yes + _log(1 - high), no + _log(1 - low))
    return log_rest, log_alpha


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _check_classes(accurate: int, robust: int) -> None:
    if accurate != robust:
        raise InputError(
            f"the accurate network has {accurate} classes and the robust one {robust}; mix two that were made for the"
            " same data"
        )
