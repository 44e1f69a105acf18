"""The attacks of an evaluation by name, and the suites that are sequences of them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from toughen.attacks import PGD, FeatureShift
from toughen.errors import InputError, unknown
from toughen.evaluation.autoattack import APGD, FAB, Square, TargetedAPGD, TargetedFAB, paper, standard
from toughen.evaluation.minimal import CarliniWagner
from toughen.evaluation.pixle import Pixle
from toughen.evaluation.stadv import StAdv
from toughen.layers import map_layers
from toughen.types import ThreatModel


class Search(Protocol):
    """An attack of an evaluation: a dataclass of settings that is called with a chunk of samples.

    It returns images of the shape of ``x``, in [0, 1], and leaves the model as found. Optional attributes: ``threat``
    (then farther images don't count), ``reseeds`` (each chunk's generator begins at the evaluation's seed),
    ``remarks(num_classes, image_shape)`` on how it departs from its published form, and ``libraries`` that it calls.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Perturb the images [B, C, H, W] of the labels [B]."""
        ...


Suite = tuple[tuple[str, Search], ...]


@dataclass(frozen=True)
class EvalAttack:
    """A named attack.

    Attributes:
        name: Under which its result is found.
        attack: One search; or a suite, whose named searches run in order, each on what still stands; or None, which
            leaves the images clean.

    Raises:
        InputError: A search whose settings can't be recorded: no dataclass, or one whose fields are no plain values.
    """

    name: str
    attack: Search | Suite | None = None

    def __post_init__(self) -> None:
        self.settings()  # refused here, not after the first images

    @property
    def stages(self) -> Suite:
        """The searches in their order, by name."""
        if self.attack is None:
            return ()
        return self.attack if isinstance(self.attack, tuple) else ((self.name, self.attack),)

    def settings(self) -> dict[str, Any]:
        """Return norm, eps, steps and so on as plain values; of each stage where there are several."""
        plain = {name: _recorded(self.name, search) for name, search in self.stages}
        return plain if isinstance(self.attack, tuple) else plain.get(self.name, {})


def _recorded(name: str, search: object) -> dict[str, Any]:
    if not is_dataclass(search) or isinstance(search, type):
        given = getattr(search, "__name__", type(search).__name__)
        raise InputError(
            f"attack {name!r}: {given} is no dataclass instance; make it a (frozen) dataclass that is called as "
            "attack(model, x, y, generator=generator), so that its settings can be recorded"
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(search)))
    except TypeError as error:
        raise InputError(
            f"attack {name!r}: the fields of {type(search).__name__} must be numbers, text or such in lists, so that "
            f"they can be recorded: {error}"
        ) from None
    return plain


def check_attack(attack: object) -> None:
    """Refuse what is no ``EvalAttack``.

    Raises:
        InputError: Says how to make one of it.
    """
    if isinstance(attack, EvalAttack):
        return
    given, make = type(attack).__name__, 'EvalAttack("NAME", ...)'
    if isinstance(attack, str):
        given, make = f"the name {attack!r}", f'parse_attack("{attack}", threat=..., step_size=...)'
    raise InputError(f"an attack is given as {given}; make it one with {make} from toughen.evaluation")


@dataclass(frozen=True, kw_only=True)
class FeatureAttack:
    """PGD on the distance of features (Eq. 5) over all layers: what a defence of features should be tried with.

    Args:
        threat: The allowed perturbations.
        step_size: Of one step, in pixel units.
        steps: Number of steps.
    """

    threat: ThreatModel
    step_size: float
    steps: int = 50

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """See ``Search``."""
        layers = tuple(layer.name for layer in map_layers(model, x[:1]).selectable)
        search = PGD(self.threat, step_size=self.step_size, steps=self.steps)
        return search(model, x, y, goal=FeatureShift(layers=layers, norm="rms"), generator=generator)


# the usual radius and step of l2 attacks on images of 32 x 32, for those who attack in l2 beside another norm
_L2, _L2_STEP_SIZE = ThreatModel(norm="l2", eps=128 / 255), 15 / 255


@dataclass(frozen=True)
class _Kind:
    """How a name becomes an attack: its class, the settings that the name stands for, and what it is told."""

    make: type
    fixed: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = ()  # of the names that are listed; any number may stand behind the name
    steps_like_pgd: bool = False  # takes the evaluation's step size
    l2: bool = False  # whatever the norm of the evaluation


_KINDS = {
    "fgsm": _Kind(PGD, {"steps": 1, "random_start": False}),
    "pgd": _Kind(PGD, steps=(10, 20, 50, 100), steps_like_pgd=True),
    "apgd-ce": _Kind(APGD, {"loss": "ce"}),
    "apgd-dlr": _Kind(APGD, {"loss": "dlr"}),
    "apgd-t": _Kind(TargetedAPGD),
    "fab": _Kind(FAB),
    "fab-t": _Kind(TargetedFAB),
    "square": _Kind(Square),
    "pgd-l2": _Kind(PGD, steps=(20,), steps_like_pgd=True, l2=True),
    "cw": _Kind(CarliniWagner, l2=True),
    "stadv": _Kind(StAdv),
    "pixle": _Kind(Pixle),
    "feature": _Kind(FeatureAttack, steps=(50,), steps_like_pgd=True),
}
_SUITES: dict[str, Callable[[ThreatModel], Suite]] = {"standard": standard, "paper": paper}


def attack_names() -> tuple[str, ...]:
    """Return the names that ``parse_attack`` takes; any number of steps may stand behind the counted ones."""
    kinds = (f"{name}-{k}" if k else name for name, kind in _KINDS.items() for k in kind.steps or (0,))
    return ("clean", *kinds, *_SUITES)


def parse_attack(spec: str, *, threat: ThreatModel, step_size: float) -> EvalAttack:
    """Make the attack of this name.

    Args:
        spec: A name of ``attack_names``, and settings behind colons: ``pgd-20:restarts=5``, ``square:queries=1000``,
            ``pgd-20:eps=4/255``. ``eps`` replaces that of the threat model, and the step size scales along with it.
            ``fgsm`` is one step of eps from the image itself; ``pgd-K`` takes K steps by cross-entropy from a random
            start, and the last iterate counts; with ``restarts``, a sample falls if any of them breaks it.
            ``pgd-l2-K`` and ``cw`` are l2 attacks, of radius 128/255 and step size 15/255 where ``threat`` has another
            norm. ``standard`` is AutoAttack as published, ``paper`` its form in the paper.
        threat: What the attack may do.
        step_size: Of PGD, in pixel units.

    Raises:
        InputError: Unknown name or setting, or a value out of its range.
    """
    name, *words = spec.split(":")
    given: dict[str, Any] = {}
    for key, value in (_setting(word, spec) for word in words):
        if key in given:
            raise InputError(f"attack {spec!r}: {key} is given twice; give it once")
        given[key] = value
    if name == "clean" and not given:
        return EvalAttack(spec)
    if name in _SUITES:
        eps = given.pop("eps", threat.eps)
        if given:
            raise InputError(f"attack {spec!r}: {name!r} is a fixed suite; it takes eps and no other setting")
        return EvalAttack(spec, _SUITES[name](_with(threat, eps=eps)))
    if match := re.fullmatch(r"(.+?)-(-?\d+)", name):
        name = match[1]
    kind = _KINDS.get(name)
    if kind is None or bool(kind.steps) != bool(match):
        listed = ", ".join(f"{name}-K" for name, kind in _KINDS.items() if kind.steps)
        raise unknown("attack", spec.partition(":")[0], attack_names(), hint=f"any K in {listed}, at least 1")
    if match:
        if not re.fullmatch(r"[1-9]\d{0,4}", match[2]):
            raise InputError(f"attack {spec!r}: steps are {match[2]}; write 1 to 99999, as in {name}-{kind.steps[0]}")
        given = {"steps": int(match[2]), **given}  # a strength curve varies the steps
    return EvalAttack(spec, _made(kind, given, threat, step_size, spec))


def _made(kind: _Kind, given: dict[str, Any], threat: ThreatModel, step_size: float, spec: str) -> Search | Suite:
    allowed = {one.name for one in fields(kind.make)} - {*kind.fixed, "threat", "model_mode"}
    if kind.l2 and threat.norm != "l2":
        threat, step_size = _L2, _L2_STEP_SIZE
    settings = {**kind.fixed, **given}
    if "threat" in (one.name for one in fields(kind.make)):
        allowed.add("eps")
        eps = settings.pop("eps", threat.eps)
        step_size *= eps / threat.eps if threat.eps else 1.0
        settings["threat"] = _with(threat, eps=eps)
    if kind.steps_like_pgd:
        settings.setdefault("step_size", step_size)
    if kind.make is PGD and not kind.steps_like_pgd:  # FGSM
        settings["step_size"] = settings["threat"].eps
    for key in given:
        if key not in allowed:
            raise unknown(f"setting of attack {spec!r}", key, allowed)
    restarts = settings.pop("restarts", 1) if kind.make is PGD else 1
    try:
        search: Search = TypeAdapter(kind.make).validate_python(settings)
        number = TypeAdapter(PositiveInt).validate_python(restarts)
    except ValidationError as error:
        raise _told(error, spec) from None
    # not the restarts of PGD itself, which compare losses: any restart that breaks a sample counts
    return search if number == 1 else tuple((f"restart-{i + 1}", search) for i in range(number))


def _with(threat: ThreatModel, *, eps: float) -> ThreatModel:
    return threat if eps == threat.eps else replace(threat, eps=eps)


def _setting(word: str, spec: str) -> tuple[str, Any]:
    """Read ``key=value``; numbers and fractions become numbers, what else the setting allows is checked later."""
    key, equals, text = word.partition("=")
    if not (key and equals and text):
        raise InputError(f"attack {spec!r}: {word!r} is not a setting; write NAME:key=value, as in pgd-20:restarts=5")
    try:
        return key, int(text) if text.isdigit() else float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        if key == "eps":  # the step size scales with it before anything is checked
            raise InputError(
                f"attack {spec!r}: eps is {text!r}; it must be a number or a fraction, as in 8/255"
            ) from None
        return key, text


def _told(error: ValidationError, spec: str) -> InputError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(f"attack {spec!r}: {cause}")
    setting = ".".join(str(part) for part in first["loc"]) or "restarts"
    return InputError(f"attack {spec!r}: {setting} is {first['input']!r}; {first['msg'].lower()}")
