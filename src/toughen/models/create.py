"""From a spec to a classifier: images in [0, 1] go in, logits come out, wherever the network is from."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from toughen.errors import InputError, Notice, unknown
from toughen.models import robustbench
from toughen.models.fit import check_fit
from toughen.models.normalize import Normalize, normalising_part
from toughen.models.registry import MODELS
from toughen.models.sources import IMAGENET, SOURCES, USER, Statistics, Wanted
from toughen.models.weights import Classifier, load_weights
from toughen.rng import stream_seed

CIFAR10: Statistics = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
FOLDERS = ("timm", "torchvision", "hub", "robustbench")  # what a spec can begin with


def create(
    spec: str,
    *,
    num_classes: int = 10,
    width: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data_statistics: Statistics | None = None,
    seed: int | None = None,
    pretrained: bool | None = None,
    weights: str | Path | None = None,
    classifier: Classifier = "loaded",
) -> nn.Module:
    """Build a classifier: images in [0, 1] go in, logits come out; it normalises inside.

    A spec is one of these:

    - ``resnet18``: a built-in network, a key of ``MODELS``;
    - ``timm/NAME``: timm's; ``timm/NAME.TAG`` chooses among its published weights;
    - ``torchvision/NAME``: torchvision's;
    - ``hub/OWNER/REPO``, or with ``@REVISION``: a timm model on the Hugging Face hub, with its weights there;
    - ``robustbench/NAME``: RobustBench's, with its normalisation; ``weights`` is the file that RobustBench offers;
    - ``package.module:function``: the user's own, called with those of num_classes, in_channels and image_size that
      are among its parameters.

    Args:
        spec: Which network.
        num_classes: Number of logits, at least 2.
        width: Built-in networks: channels of the first stage; the others are multiples of it. None is the published
            network's (64 for ResNets, DenseNet and VGG, 16 times the widening factor for wide ResNets, 216 for
            ``rawrn70_16``, 16 for ``small_cnn``).
        in_channels: Channels of the images.
        image_size: Sides of the images in pixels, for those of timm's networks that are built for one size. Where it
            is given, a network from elsewhere is tried on one image of that size.
        mean: Channel means for the ``Normalize`` layer, in [0, 1]. None is what belongs to the weights: the
            statistics of the published ones, with ``pretrained`` or ``weights``, or those that the file holds. Without
            any they are the ``data_statistics``, or else CIFAR-10's for a built-in network and ImageNet's for one of
            timm or torchvision; a built-in network for another number of channels has 0.5 then, and one from
            elsewhere the average over the channels. The user's own network is not normalised unless both are given.
        std: Channel standard deviations; None as for ``mean``.
        data_statistics: Mean and standard deviation of the training images.
        seed: Draws the initial weights from the stream ``"init"`` and leaves torch's global random state as it was.
            None draws them from the global state, as ``nn.Module`` does.
        pretrained: timm and torchvision: with their published weights; the last layer is new for other classes. None
            is without, but for the hub, whose networks come with theirs unless it is False.
        weights: A file of weights; see ``fit_weights``.
        classifier: ``"new"`` keeps the last layer as drawn, and takes the rest from the weights.

    Returns:
        The model, in training mode, with ``normalize`` as its first submodule; a network from elsewhere is the second
        one, ``net``. With a seed it is on the CPU whatever the default device, so that the weights are the same on
        every machine.

    Raises:
        InputError: Unknown spec, a size or statistic that the network cannot have, an argument that means nothing to
            it, or weights that cannot be had or do not fit.

    Example:
        >>> create("small_cnn", in_channels=1, seed=0)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_spec(spec)
    _check_sizes(num_classes=num_classes, width=width, in_channels=in_channels, image_size=image_size)
    origin, name = _split(spec)
    _check_fitting(origin, spec, width=width, mean=mean, std=std, pretrained=pretrained, weights=weights)
    _check_classifier(classifier, origin, pretrained=pretrained, weights=weights)
    if origin == "robustbench":
        entry = robustbench.find(name, num_classes=num_classes)
        (origin, name), width = _split(entry.spec), entry.width
        mean, std = (own if given is None else given for given, own in zip((mean, std), entry.statistics, strict=True))
    if origin is None:
        normalize = _normalize(data_statistics or _usual(in_channels), in_channels, mean, std)
        with _initial_weights(seed):
            sizes = {} if width is None else {"width": width}
            model = MODELS[name](num_classes=num_classes, normalize=normalize, **sizes)
        if weights is not None and not load_weights(model, weights, classifier=classifier) and mean is None:
            warnings.warn(
                f"{weights} does not say how its images were normalised: {normalize.extra_repr()} is used; give mean"
                " and std if it was trained with others",
                Notice,
                stacklevel=2,
            )
        return model
    published = origin == "hub" and weights is None if pretrained is None else pretrained
    with _initial_weights(seed):
        foreign = SOURCES[origin].build(name, Wanted(num_classes, in_channels, image_size, published, classifier))
    model, file = foreign.network, weights or foreign.weights
    if origin != USER or mean is not None:
        own = foreign.statistics if published or weights is not None else None
        model = _behind(_normalize(own or data_statistics or IMAGENET, in_channels, mean, std), model)
    if file is not None:
        load_weights(model, file, classifier=classifier)
    if image_size is not None:
        check_fit(model, image_shape=(in_channels, image_size, image_size), num_classes=num_classes)
    return model


def check_spec(spec: str) -> None:
    """Refuse a spec that names no network, without building one.

    Raises:
        InputError: What is wrong with it, with the nearest name.
    """
    origin, name = _split(spec)
    if origin is None:
        if name not in MODELS:
            raise unknown("model", name, MODELS, hint=f"or {', '.join(f'{key}/NAME' for key in FOLDERS)} or {USER}")
    elif origin == "robustbench":
        robustbench.find(name)
    else:
        SOURCES[origin].check(name)


def is_spec(text: str) -> bool:
    """Return whether ``create`` knows this spec; a form for which a network must be asked counts as known."""
    try:
        check_spec(text)
    except InputError:
        return False
    return True


def model_names(pattern: str | None = None) -> list[str]:
    """List specs that ``create`` knows by name.

    Args:
        pattern: Shell-style, such as ``timm/vit_*``, ``robustbench/cifar100/*`` or ``*wrn*``. None lists the built-in
            networks; hub models and the user's functions are never listed.
    """
    if pattern is None:
        return sorted(MODELS)
    fixed = re.split(r"[*?\[]", pattern)[0]
    names = [*MODELS, *(f"robustbench/{entry.path}" for entry in robustbench.TABLE)]
    for origin in ("timm", "torchvision"):
        if f"{origin}/".startswith(fixed) or fixed.startswith(f"{origin}/"):  # else its slow import is for nothing
            names += [f"{origin}/{name}" for name in SOURCES[origin].names()]
    return sorted(name for name in names if fnmatchcase(name, pattern))


def _split(spec: str) -> tuple[str | None, str]:
    """Return where a network is from (None: built in) and its name there."""
    folder, slash, name = spec.partition("/")
    if slash and folder in FOLDERS:
        return folder, name
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return USER, spec
    return None, spec


def _check_sizes(*, num_classes: int, width: int | None, in_channels: int, image_size: int | None) -> None:
    if num_classes < 2:
        raise InputError(f"num_classes is {num_classes}; a classifier needs at least 2")
    if width is not None and width < 1:
        raise InputError(f"width is {width}; the first stage needs at least 1 channel")
    if in_channels < 1:
        raise InputError(f"in_channels is {in_channels}; images have at least 1 channel")
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}; images have sides of at least 1 pixel")


def _check_fitting(
    origin: str | None,
    spec: str,
    *,
    width: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pretrained: bool | None,
    weights: str | Path | None,
) -> None:
    """Refuse arguments that mean nothing for networks of this origin."""
    if width is not None and origin is not None:
        raise InputError(f"width is {width}, and {spec} has its own; only built-in networks take a width")
    if pretrained and weights is not None:
        raise InputError(f"pretrained and weights={weights} are both given; choose one")
    if pretrained and origin in (None, "robustbench", USER):
        reason = "RobustBench offers its files for download by hand" if origin == "robustbench" else "it publishes none"
        raise InputError(f"{spec} cannot be had pretrained, since {reason}; give weights=FILE")
    if origin == USER and (mean is None) != (std is None):
        raise InputError(f"{spec} is given only one of mean and std; give both, or neither for no normalisation")


def _check_classifier(
    classifier: str, origin: str | None, *, pretrained: bool | None, weights: str | Path | None
) -> None:
    if classifier not in get_args(Classifier):
        raise unknown("classifier", str(classifier), get_args(Classifier))
    if classifier == "new" and not pretrained and weights is None and (origin != "hub" or pretrained is False):
        raise InputError("classifier is 'new', which means something only beside weights; give weights or pretrained")


def _usual(in_channels: int) -> Statistics:
    return CIFAR10 if in_channels == len(CIFAR10[0]) else ((0.5,) * in_channels, (0.5,) * in_channels)


def _normalize(
    usual: Statistics, in_channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Normalize:
    """Build the layer from what is given, else from the usual statistics, averaged for another number of channels."""
    for what, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != in_channels:
            raise InputError(f"{what} has {len(given)} numbers; in_channels={in_channels} needs {in_channels}")
        if given is not None and any(abs(value) > 1 for value in given):
            raise InputError(f"{what} is {tuple(given)}; it is for pixels in [0, 1], so divide levels by 255")
    fitted = [own if len(own) == in_channels else (sum(own) / len(own),) * in_channels for own in usual]
    return Normalize(fitted[0] if mean is None else mean, fitted[1] if std is None else std)


def _behind(normalize: Normalize, network: nn.Module) -> nn.Sequential:
    part = normalising_part(network, channels=normalize.channels)
    if part is not None:
        warnings.warn(
            f"the network normalises its images itself, in {part}: with mean and std they are normalised twice",
            Notice,
            stacklevel=3,
        )
    return nn.Sequential(OrderedDict(normalize=normalize, net=network))


@contextmanager
def _initial_weights(seed: int | None) -> Iterator[None]:
    """Inside, module constructors draw from the stream ``"init"`` of ``seed``, if one is given."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that reseeds the CUDA generators too, which the fork does not restore.
        torch.default_generator.manual_seed(stream_seed(seed, "init"))
        yield
