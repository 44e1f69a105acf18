"""Networks of other packages: timm's, torchvision's, the Hugging Face hub's, and the user's own functions.

Each source builds a network that maps images to logits, and knows the statistics its published weights were trained
with. timm and torchvision take seconds to import, so they are imported when one of their networks is asked for.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from toughen.downloads import check_hub_files
from toughen.errors import InputError, first_line, unknown
from toughen.models.weights import Classifier, fit_weights
from toughen.registry import imported

Statistics = tuple[Sequence[float], Sequence[float]]

_HASHED = re.compile(r"-[0-9a-f]{8,}\.[^/]*$")  # an address whose file is called by the start of its SHA-256

IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Wanted(NamedTuple):
    """What a network is asked to be.

    Attributes:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Sides of the images in pixels, for networks that are built for one size; None if not known.
        pretrained: Whether with the weights that its source publishes.
        classifier: ``"new"`` draws the last layer anew, whatever these weights hold.
    """

    num_classes: int
    in_channels: int
    image_size: int | None
    pretrained: bool
    classifier: Classifier


class Foreign(NamedTuple):
    """A network from elsewhere.

    Attributes:
        network: Images to logits.
        statistics: Mean and standard deviation for its published weights; None if it has none.
        weights: A file of weights that is still to be loaded.
    """

    network: nn.Module
    statistics: Statistics | None
    weights: Path | None = None


class Source(NamedTuple):
    """How the networks of one origin are listed, checked and built, by names without the origin.

    A check raises an ``InputError`` for a name that is not one; only checked names are built.
    """

    names: Callable[[], list[str]]
    check: Callable[[str], None]
    build: Callable[[str, Wanted], Foreign]


# -- timm -----------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    return sorted({*timm.list_models(), *timm.list_pretrained()})  # architectures, and each with its weights' tags


def _check_timm(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):  # nor are the addresses and paths that timm would load from
        raise unknown("timm model", name, timm.list_models(), hint="listed by toughen list models 'timm/*'")
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise unknown(f"weights of timm/{architecture}", name, tagged or [architecture])


def _build_timm(name: str, wanted: Wanted) -> Foreign:
    import timm

    facts = timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict()  # type: ignore[union-attr]
    if wanted.pretrained and not (facts["hf_hub_id"] or facts["url"]):
        raise InputError(f"timm/{name} has no published weights; leave pretrained out, or give weights=FILE")
    with _hashes_checked(bool(_HASHED.search(facts["url"] or ""))):
        network = _timm_network(f"timm/{name}", name, wanted, facts, {"pretrained": wanted.pretrained})
    if wanted.pretrained and facts["hf_hub_id"]:
        _check_cached(facts["hf_hub_id"])
    if wanted.pretrained and wanted.classifier == "new":
        network.reset_classifier(wanted.num_classes)  # timm itself does so only for another number of classes
    return Foreign(network, (facts["mean"], facts["std"]))


@contextmanager
def _hashes_checked(wanted: bool) -> Iterator[None]:
    """Inside, timm compares what it fetches with the hash in its name, or not; the program's own choice comes back."""
    from timm.models import _builder, set_pretrained_check_hash

    before = _builder._CHECK_HASH
    set_pretrained_check_hash(wanted)
    try:
        yield
    finally:
        set_pretrained_check_hash(before)


def _check_cached(repository: str) -> None:
    """Compare the weights that timm has just loaded from the hub with the checksum that the hub gives."""
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    found = [try_to_load_from_cache(repository.partition("@")[0], file) for file in files]
    check_hub_files(Path(path) for path in found if isinstance(path, str))


def _timm_network(spec: str, name: str, wanted: Wanted, facts: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Build with timm; networks that are for one size of images are told that size."""
    import timm

    size = {"img_size": wanted.image_size} if wanted.image_size is not None and facts.get("fixed_input_size") else {}
    asked = {"num_classes": wanted.num_classes, "in_chans": wanted.in_channels, **size}
    with _fetching(spec) if arguments.get("pretrained") else _building(spec, asked):
        return timm.create_model(name, **{**arguments, **asked})


# -- torchvision ----------------------------------------------------------------------------------

# in training they return logits of two or three classifiers
_SEVERAL_LOGITS = ("googlenet", "inception_v3")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models(module=models) if name not in _SEVERAL_LOGITS]


def _check_torchvision(name: str) -> None:
    if name in _SEVERAL_LOGITS:
        raise InputError(f"torchvision/{name} returns several logits in training; take timm/inception_v3")
    if name not in (names := _torchvision_names()):
        raise unknown("torchvision model", name, names, hint="listed by toughen list models 'torchvision/*'")


def _build_torchvision(name: str, wanted: Wanted) -> Foreign:
    from torchvision import models

    if wanted.in_channels != 3:
        raise InputError(f"torchvision/{name} takes 3 channels, not {wanted.in_channels}; timm/ has networks for any")
    published = models.get_model_weights(name).DEFAULT
    preset = published.transforms()
    network = models.get_model(name, weights=None, num_classes=wanted.num_classes)
    if wanted.pretrained:
        with _fetching(f"torchvision/{name}"):
            state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        fits = len(published.meta["categories"]) == wanted.num_classes
        fit_weights(network, state, source=published.url, classifier=wanted.classifier if fits else "new")
    return Foreign(network, (preset.mean, preset.std))


# -- the Hugging Face hub -------------------------------------------------------------------------


def _check_hub(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise InputError(f"hub/{name} is not of the form hub/OWNER/REPO or hub/OWNER/REPO@REVISION")


def _build_hub(name: str, wanted: Wanted) -> Foreign:
    """Build the timm network that ``config.json`` describes; weights only from safetensors, which cannot run code."""
    import timm

    config = _hub_config(name)
    facts = config.get("pretrained_cfg", config)  # older files have its keys at the top
    # what timm recorded to build the network again; where to load from is not for a repository to say
    closed = inspect.signature(timm.create_model).parameters
    recorded = {key: value for key, value in config.get("model_args", {}).items() if key not in closed}
    network = _timm_network(f"hub/{name}", config["architecture"], wanted, facts, recorded)
    statistics = facts.get("mean", IMAGENET[0]), facts.get("std", IMAGENET[1])
    return Foreign(network, statistics, _hub_file(name, "model.safetensors") if wanted.pretrained else None)


def _hub_config(name: str) -> dict[str, Any]:
    try:
        config = json.loads(_hub_file(name, "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        config = None
    if not (
        isinstance(config, dict)
        and isinstance(config.get("architecture"), str)
        and all(isinstance(config.get(part, {}), dict) for part in ("pretrained_cfg", "model_args"))
        and all(_are_numbers(config.get("pretrained_cfg", config).get(part, ())) for part in ("mean", "std"))
    ):
        raise InputError(
            f"hub/{name} has no config.json in timm's form; a model of the hub must be one that timm saved"
        )
    _check_timm(config["architecture"])
    return config


def _are_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(number) in (int, float) for number in value)


def _hub_file(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    with _fetching(f"hub/{name}"):
        path = Path(hf_hub_download(repository, file, revision=revision or None))
        check_hub_files([path])
        return path


# -- the user's functions -------------------------------------------------------------------------


def _check_function(spec: str) -> None:
    imported(spec, what="model")


def _build_function(spec: str, wanted: Wanted) -> Foreign:
    """Call the user's function with those of num_classes, in_channels and image_size that are among its parameters.

    A function that passes any keywords on (``**kwargs``) is told num_classes, which every library calls so.

    Raises:
        InputError: It is not there, needs other arguments, or returns something else than a module.
    """
    function = imported(spec, what="model")
    if isinstance(function, nn.Module):
        raise InputError(f"{spec} is a model, not a function that returns one; name a function or a class")
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise InputError(f"{spec} does not say what arguments it takes; wrap it in a function that does") from None
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    offered = {key: getattr(wanted, key) for key in ("num_classes", "in_channels", "image_size")}
    given = {k: v for k, v in offered.items() if k in signature.parameters or (open_ended and k == "num_classes")}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise InputError(f"{spec} cannot be called with {', '.join(given) or 'no arguments'}: {error}") from None
    try:
        network = function(**given)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{spec} fails with {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{spec} returns a {type(network).__name__}; it must return a torch.nn.Module")
    return Foreign(network, None)


# -- what they share ------------------------------------------------------------------------------


@contextmanager
def _building(spec: str, asked: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a network says to arguments of anybody's config.json
        told = ", ".join(f"{key}={value}" for key, value in asked.items())
        raise InputError(f"{spec} cannot be built with {told}: {first_line(error)}") from error


@contextmanager
def _fetching(spec: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the network's, the hub's, or of the reader of a damaged file
        raise InputError(
            f"the published weights of {spec} cannot be had ({first_line(error)}); without a network give weights=FILE"
        ) from error


USER = "package.module:function"
SOURCES: dict[str, Source] = {
    "timm": Source(_timm_names, _check_timm, _build_timm),
    "torchvision": Source(_torchvision_names, _check_torchvision, _build_torchvision),
    "hub": Source(list, _check_hub, _build_hub),  # without end, so that none are listed
    USER: Source(list, _check_function, _build_function),
}
