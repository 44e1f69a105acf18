"""Weights into models: matched by name and shape, whatever wrapped the network when it was saved."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from toughen.errors import InputError, Notice, unknown
from toughen.models.normalize import STATISTICS, Normalize
from toughen.models.weight_files import read_weights

Classifier = Literal["loaded", "new"]
Tensors = Mapping[str, Tensor]

# no image's logits depend on them: counters of batch norm, of averaged models and of a FLOP counter
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
# TRADES' WideResNet holds a block that its forward does not call
NEVER_RUN = ("sub_block1.",)
# torchvision's DenseNet weights are older than the names of its DenseNet, which have one level less
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


def load_weights(model: nn.Module, file: str | Path, *, classifier: Classifier = "loaded") -> bool:
    """Load a weights file into a model, strictly; see ``fit_weights``, of which this is the form for files.

    Raises:
        InputError: The file cannot be read, or does not fit.
    """
    return fit_weights(model, read_weights(file), source=str(file), classifier=classifier)


def restore_weights(model: nn.Module, file: str | Path) -> None:
    """Load a file that was saved from this very model: the same names and shapes, statistics of images included.

    Raises:
        InputError: The file cannot be read, or is of another model.
    """
    own, tensors = model.state_dict(), read_weights(file)
    _check(own, tensors, tensors.keys() - own.keys(), source=str(file))
    _copy(own, tensors)


def fit_weights(model: nn.Module, tensors: Tensors, *, source: str, classifier: Classifier = "loaded") -> bool:
    """Copy tensors into a model: each of its own must be there, with its shape, and nothing may be left over.

    Of all nested mappings the one is taken that fits best, and of all prefixes (``module.``, ``model.``, ...) that
    under which it covers the model; a wrapper of the whole network inside the model needs no name in the file. Left
    over may be counters, equal copies of what was loaded, and blocks that no forward calls. Precisions are converted.

    Statistics of the images that are among the tensors take the place of those in the model's ``Normalize``, so that
    they are applied once; a warning says so where they differ.

    Args:
        model: Left as it is if anything does not fit.
        tensors: By name, as ``read_weights`` returns them.
        source: Where they come from, for messages.
        classifier: ``"new"`` keeps the model's own last layer, a linear one or a 1x1 convolution, and loads the rest.

    Returns:
        Whether statistics of the images were among the tensors.

    Raises:
        InputError: What does not fit, and the likely fix.
    """
    if classifier not in get_args(Classifier):
        raise unknown("classifier", str(classifier), get_args(Classifier))
    normalize, own = _split_normalize(model)
    last = _last_linear(model)
    if classifier == "new" and not last:
        raise InputError(f"classifier='new' keeps a last layer that is linear, and {type(model).__name__} has none")
    found, rest = _match(own, tensors, source)
    statistics = _take_statistics(rest, normalize, source)
    wanted = {n: v for n, v in own.items() if _last(n) not in COUNTERS and (n not in last or classifier == "loaded")}
    _check(wanted, found, rest, source=source, last=last)
    _copy(wanted, found)
    _copy({n: v for n, v in own.items() if _last(n) in COUNTERS and n in found and _alike(found[n], v)}, found)
    if normalize is not None and statistics is not None:
        _replace(normalize, statistics, source)
    return statistics is not None


def _split_normalize(model: nn.Module) -> tuple[Normalize | None, dict[str, Tensor]]:
    """Return the model's only ``Normalize``, and all its tensors but those of this layer."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Normalize)]
    if len(layers) != 1:
        return None, own
    name, normalize = layers[0]
    return normalize, {key: value for key, value in own.items() if key not in (f"{name}.mean", f"{name}.std")}


def _last_linear(model: nn.Module) -> set[str]:
    """Name the parameters of the classifier: what the network itself calls so, or the last layer defined, if linear."""
    for place, module in model.named_modules():
        if callable(getattr(module, "get_classifier", None)):
            head = module.get_classifier()
            names = (
                {id(parameter): key for key, parameter in head.named_parameters()}
                if isinstance(head, nn.Linear)
                else {}
            )
            return {f"{place}.{n}".removeprefix(".") for n, p in module.named_parameters() if id(p) in names}
    owners = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    name, last = owners[-1] if owners else ("", model)
    linear = isinstance(last, nn.Linear) or (isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1))
    return {f"{name}.{key}".removeprefix(".") for key, _ in last.named_parameters()} if linear else set()


class _Place(NamedTuple):
    """Where in a file the network may be: in which nested mapping, behind which prefix of its names."""

    path: str
    prefix: str


def _match(own: Tensors, tensors: Tensors, source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find the model's tensors, by its names, and whatever else their mapping holds that could matter."""
    stem = _common_stem(own)
    bare = {name.removeprefix(stem): name for name in own}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, _, name = key.rpartition("/")
        groups.setdefault(path, {})[OLD_DENSENET.sub(r"\1\2", name)] = value
    scores: dict[_Place, tuple[int, int]] = {}
    for path, group in groups.items():
        for key, value in group.items():
            for prefix, name in _splits(key):
                if name in bare:
                    alike, named = scores.get(_Place(path, prefix), (0, 0))
                    scores[_Place(path, prefix)] = (alike + _alike(value, own[bare[name]]), named + 1)
    if not scores:
        return {}, max(groups.values(), key=len)
    best = max(scores, key=lambda place: (*scores[place], -len(place.prefix)))  # among equals the first in the file
    found = {bare[name]: value for name, value in _under(best.prefix, groups[best.path]).items() if name in bare}
    for place, score in scores.items():
        if place.path != best.path and score == scores[best]:
            rival = _under(place.prefix, groups[place.path])
            if not all(_equal(rival.get(name.removeprefix(stem)), value) for name, value in found.items()):
                warnings.warn(
                    f"{source} holds several sets of weights that fit: {best.path or 'the outermost'} is used, and not"
                    f" {place.path or 'the outermost'}; to use that one, save it alone",
                    Notice,
                    stacklevel=4,
                )
    return found, {key: v for key, v in groups[best.path].items() if _matters(key, v, best.prefix, bare, found)}


def _matters(key: str, value: Tensor, prefix: str, bare: Mapping[str, str], found: Tensors) -> bool:
    """Return whether a tensor of the file is neither one of the model's, nor a copy of one, nor of no effect."""
    if key.startswith(prefix) and (key.removeprefix(prefix) in bare or key.removeprefix(prefix).startswith(NEVER_RUN)):
        return False
    copied = any(_equal(found.get(bare[name]), value) for _, name in _splits(key) if name in bare)
    return not copied and _last(key) not in COUNTERS


def _take_statistics(rest: dict[str, Tensor], normalize: Normalize | None, source: str) -> tuple[Tensor, Tensor] | None:
    """Move the mean and standard deviation of images out of the rest, each as [C].

    Raises:
        InputError: They contradict each other, are not of images in [0, 1], or the model has no place for them.
    """
    channels = normalize.channels if normalize is not None else 3
    taken: list[tuple[Tensor, Tensor]] = []
    for key in list(rest):
        for mean_name, std_name in STATISTICS:
            other = key.removesuffix(mean_name) + std_name
            if _last(key) == mean_name and other in rest and {rest[k].numel() for k in (key, other)} <= {1, channels}:
                values = [rest.pop(k).detach().float().flatten().expand(channels) for k in (key, other)]
                taken.append((values[0], values[1]))
    if not taken:
        return None
    mean, std = taken[0]
    told = f"mean {_numbers(mean)} and std {_numbers(std)}"
    if not all(_equal(mean, m) and _equal(std, s) for m, s in taken):
        raise InputError(f"{source} holds several statistics of images that differ; leave the right one in the file")
    if not bool((mean.abs() <= 1).all() and (std > 0).all() and torch.isfinite(std).all()):
        raise InputError(f"{source} holds {told} for images, which cannot be of pixels in [0, 1]")
    if normalize is None:
        raise InputError(f"{source} holds {told} for images, and the model does not normalise: build it with these")
    return mean, std


def _replace(normalize: Normalize, statistics: tuple[Tensor, Tensor], source: str) -> None:
    own = normalize.mean, normalize.std
    if any(not torch.allclose(o.flatten().cpu(), s, rtol=0, atol=1e-6) for o, s in zip(own, statistics, strict=True)):
        given = " and ".join(_numbers(value) for value in statistics)
        warnings.warn(
            f"{source} holds its own normalisation, mean and std {given}, which is used instead of the model's"
            f" {' and '.join(_numbers(value.flatten()) for value in own)}",
            Notice,
            stacklevel=4,
        )
    with torch.no_grad():
        for value, new in zip(own, statistics, strict=True):
            value.copy_(new.view_as(value))


def _check(wanted: Tensors, found: Tensors, extra: Iterable[str], *, source: str, last: Iterable[str] = ()) -> None:
    """Refuse tensors that are not the model's, in one line."""
    extra = sorted(extra)
    missing = [name for name in wanted if name not in found]
    other = [name for name, value in wanted.items() if name in found and not _alike(found[name], value)]
    if not (missing or extra or other):
        return
    problems = []
    if missing:
        problems.append(f"it lacks {len(missing)} of {len(wanted)} tensors ({_first(missing)})")
    if extra:
        problems.append(f"it has {len(extra)} others ({_first(extra)})")
    if other:
        shapes = [
            f"{name!r} is {_form(found[name])} in the file and {_form(wanted[name])} in the model" for name in other
        ]
        problems.append(f"{len(other)} differ in shape: {_first(shapes)}")
    hint = "was it saved from another architecture, width or image size?"
    if not missing and not extra and set(other) <= set(last):
        classes = found[other[0]].shape[0]
        hint = f"build the model with num_classes={classes}, or keep a new last layer with classifier='new'"
    raise InputError(f"{source} belongs to another model: {'; '.join(problems)}; {hint}")


def _copy(own: Tensors, found: Tensors) -> None:
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def _common_stem(names: Iterable[str]) -> str:
    """Return the dotted prefix that all names share, such as ``net.`` of a wrapped network."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield ``("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")``."""
    parts = key.split(".")
    for i in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:i]), ".".join(parts[i:])


def _under(prefix: str, group: Tensors) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in group.items() if key.startswith(prefix)}


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _alike(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool((a == b).all())


def _form(value: Tensor) -> str:
    return f"{list(value.shape)}" if value.is_floating_point() else f"{list(value.shape)} of {value.dtype}"


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _numbers(values: Tensor) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values.tolist())})"
