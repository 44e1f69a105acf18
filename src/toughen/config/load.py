"""Recipes: found by name or path, overridden by dotted keys, resolved to settings."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from toughen import models
from toughen.attacks import PGD, fgsm_rs
from toughen.config.build import build
from toughen.config.code import Permission, packages_named
from toughen.config.dotted import set_keys
from toughen.data import AUGMENTS, DataSettings
from toughen.documents import parse_yaml
from toughen.engine import EvaluateSettings, MixtureSettings, ModelSettings, Recipe, TrainSettings
from toughen.engine.checkpoint import whole_weights
from toughen.errors import InputError, unknown
from toughen.methods import Stack, Wrapper, stack
from toughen.objectives import METHODS, Objective
from toughen.registry import Registry, imported
from toughen.run_folder import RunFolder
from toughen.types import ThreatModel

ATTACKS: Registry[Any] = Registry("attack")
ATTACKS.register("pgd")(PGD)
ATTACKS.register("fgsm-rs")(fgsm_rs)

REQUIRED = ("model", "data", "threat", "attack", "method", "train")
OPTIONAL = ("evaluate", "branch_epoch", "branches", "description")
_SECTIONS: Mapping[str, Any] = {
    "model": ModelSettings,
    "data": DataSettings,
    "threat": ThreatModel,
    "attack": PGD,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
}


def load_recipe(name: str, overrides: Sequence[str] = (), *, allow_code: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply dotted overrides, and resolve it.

    Args:
        name: A name of ``toughen list recipes``, or the path of a YAML file.
        overrides: ``"key.path=value"``; values are YAML, list items are addressed by number. Another ``model.name``
            comes with its own width, unless ``model.width`` is given too.
        allow_code: Packages of whose code the file may name methods and models, besides those that the
            overrides name and those in the variable ``TOUGHEN_ALLOW_CODE``.

    Raises:
        InputError: Unknown recipe or key, a value of the wrong type, settings that contradict each other, or code of a
            package that was not allowed.
    """
    document = read_document(name)
    changes = [parse_override(override) for override in overrides]
    try:
        set_keys(document, changes)
    except InputError as error:
        raise InputError(f"override {error}") from None
    return resolve(document, code=Permission.of_user(f"recipe {name}", [*allow_code, *packages_named(overrides)]))


def recipe_of(run: RunFolder, *, allow_code: Iterable[str] = ()) -> Recipe:
    """Return the recipe that a run was made with.

    Args:
        run: May be anybody's.
        allow_code: As for ``load_recipe``.

    Raises:
        InputError: Its file is damaged, or names code of a package that was not allowed.
    """
    return resolve(run.config(), code=Permission.of_user(f"run {run.path}", allow_code))


def recipe_names() -> dict[str, str]:
    """Return the recipes that come with the package, each with its first line of description."""
    names = {}
    for file in sorted(_on_shelf(_shelf())):
        document = parse_yaml((_shelf() / f"{file}.yaml").read_text(), what=f"recipe {file}")
        names[file] = document["description"].strip().splitlines()[0]
    return names


def read_document(name: str) -> dict[str, Any]:
    """Read a recipe as plain values, without checking them, laid over the one that it extends.

    Mappings are laid over each other key by key; ``method`` and ``branches`` replace those of the other recipe, and
    another ``model.name`` does not take over its width.

    Raises:
        InputError: There is no such recipe, it is no mapping, or it extends itself.
    """
    return _extended(_read(name), name, ())


def extended(document: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Lay plain values over the recipe that they extend, if they do; see ``read_document``.

    Args:
        document: The sections of a recipe, some of which may be missing where it has the key ``extends``.
        source: The name or path of what they stand in; a path that they extend starts beside it.

    Raises:
        InputError: See ``read_document``.
    """
    return _extended(dict(document), source, ())


def _extended(document: dict[str, Any], name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise InputError(f"recipe {name} extends itself: {' -> '.join([*seen, name])}")
    if "extends" not in document:
        return document
    base = document.pop("extends")
    if not isinstance(base, str):
        raise InputError(f"recipe {name}: extends is {base!r}; it must be the name of a recipe or a .yaml file")
    if base.endswith((".yaml", ".yml")) and name.endswith((".yaml", ".yml")):
        base = os.path.normpath(Path(name).parent / base)  # one name for each file, or a circle would go unseen
    below = _extended(_read(base), base, (*seen, name))
    if "branches" in document:
        below.pop("branches", None)
    above, model = document.get("model"), below.get("model")
    if isinstance(above, dict) and isinstance(model, dict) and above.get("name") not in (None, model.get("name")):
        model.pop("width", None)  # it was the width of the other recipe's own network
    merged: dict[str, Any] = _merged(below, document)
    return merged


def _read(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"no recipe file {name}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe file {name} is not a text file that can be read: {error}") from None
    else:
        if name not in (names := _on_shelf(_shelf())):
            if Path(name).is_dir():
                raise InputError(f"recipe {name} is a folder; name a .yaml file in it")
            raise unknown("recipe", name, names, hint="or give the path of a .yaml file")
        text = (_shelf() / f"{name}.yaml").read_text()
    document = parse_yaml(text, what=f"recipe {name}")
    if not isinstance(document, dict):
        given = "empty" if document is None else f"a {type(document).__name__}"
        raise InputError(f"recipe {name} is {given}; it must be a mapping of sections")
    return document


def resolve(document: Mapping[str, Any], *, code: Permission | None = None) -> Recipe:
    """Check a recipe given as plain values and turn it into settings, branches included.

    Args:
        document: Plain values.
        code: Which code it may name; None is any, for a document that the caller wrote himself.

    Raises:
        InputError: See ``load_recipe``.
    """
    for key in document:
        if key not in REQUIRED + OPTIONAL:
            if homes := _settings_called(str(key)):
                raise InputError(f"unknown recipe key {key!r}; did you mean {' or '.join(homes)}?")
            place = f"{key} is a method: its settings are those of its entry in the list, method.N.SETTING"
            hint = place if key in METHODS else ""
            raise unknown("recipe key", str(key), REQUIRED + OPTIONAL, hint=hint)
    if missing := [key for key in REQUIRED if key not in document]:
        raise InputError(f"the recipe lacks {', '.join(missing)}; required are {', '.join(REQUIRED)}")
    threat = build(ThreatModel, document["threat"], path="threat")
    attack: PGD = _named(ATTACKS, document["attack"], path="attack", threat=threat)
    evaluate = build(EvaluateSettings, document.get("evaluate") or {}, path="evaluate")
    step_size = attack.step_size if evaluate.step_size is None else evaluate.step_size
    return Recipe(
        description=str(document.get("description", "")),
        model=_model(document["model"], code),
        data=_data(document["data"]),
        threat=threat,
        attack=attack,
        method=_stack(document["method"], code),
        train=build(TrainSettings, document["train"], path="train"),
        evaluate=evaluate,
        branch_epoch=_epoch(document.get("branch_epoch")),
        branches=_branches(document, code, test_step_size=step_size),
    )


def _settings_called(key: str) -> list[str]:
    return [f"{section}.{key}" for section, kind in _SECTIONS.items() if key in {field.name for field in fields(kind)}]


def network_of(path: str, *, allow_code: Iterable[str] = ()) -> ModelSettings:
    """Return the network that a run has trained, with its weights to start from.

    Args:
        path: A run folder, for its last checkpoint, or one of its checkpoints, for example ``RUN/checkpoints/best``.
        allow_code: As for ``load_recipe``.

    Raises:
        InputError: There is no such run, it has no such checkpoint yet or a damaged one, it trained a mixture, or its
            network is code of a package that was not allowed.
    """
    place = Path(path).expanduser()
    checkpoint = place if place.parent.name == "checkpoints" else place / "checkpoints" / "last"
    code = Permission.of_user(f"run {path}", allow_code)
    settings = _model(RunFolder.open(checkpoint.parent.parent).config().get("model"), code)
    if isinstance(settings, MixtureSettings):
        raise InputError(f"run {path} trained a mixture, which is not mixed again; give one of its two networks")
    weights = whole_weights(checkpoint)
    return replace(settings, weights=str(weights.absolute()), pretrained=False, classifier="loaded")


def _shelf() -> Traversable:
    return files("toughen") / "recipes"


def _on_shelf(folder: Traversable, under: str = "") -> list[str]:
    """The names of the recipes in a folder and in the folders below it, as in ``folder/name``."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _on_shelf(entry, f"{under}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            found.append(under + entry.name.removesuffix(".yaml"))
    return found


def _model(values: Any, code: Permission | None) -> ModelSettings | MixtureSettings:
    if isinstance(values, Mapping) and values.get("name") == "adaptive_smoothing":
        parts = {part: values[part] for part in ("accurate", "robust") if part in values}
        networks = {
            part: network_of(value, allow_code=code.packages if code else ())
            if isinstance(value, str)
            else _network(value, code, path=f"model.{part}")
            for part, value in parts.items()
        }
        return build(MixtureSettings, {**values, **networks}, path="model")
    return _network(values, code, path="model")


def _network(values: Any, code: Permission | None, *, path: str) -> ModelSettings:
    settings = build(ModelSettings, values, path=path)
    if code is not None:
        code.check(settings.name)
    models.check_spec(settings.name)  # an unknown name is refused here, before any data is read
    return settings


def _data(values: Any) -> DataSettings:
    """Build the data settings; an augmentation may be given by its name alone."""
    if isinstance(values, Mapping) and "augment" in values:
        given = values["augment"]
        members = given if isinstance(given, list | tuple) else [given]
        named = [{"name": member} if isinstance(member, str) else member for member in members]
        built = tuple(_named(AUGMENTS, m, path=f"data.augment.{number}") for number, m in enumerate(named))
        values = {**values, "augment": built}
    return build(DataSettings, values, path="data")


def _named(
    registry: Registry[Any], values: Any, *, path: str, find: Callable[[str], Any] | None = None, **given: Any
) -> Any:
    if not isinstance(values, Mapping) or "name" not in values:
        raise InputError(f"{path} is {values!r}; it must be a mapping with a name: {', '.join(registry)}")
    find = registry.__getitem__ if find is None else find
    settings = {key: value for key, value in values.items() if key != "name"}
    name = str(values["name"])
    return build(find(name), settings, path=f"{path} {name}", **given)


def _stack(methods: Any, code: Permission | None) -> Stack:
    if not isinstance(methods, list):
        raise InputError(f"method is {methods!r}; it must be a list from inner to outer, each with a name")
    find = partial(_method, code=code)
    named = [_named(METHODS, method, path=f"method.{n}", find=find) for n, method in enumerate(methods)]
    return stack(*named)


def _method(name: str, *, code: Permission | None) -> Any:
    """Find a method by its name, or a class of the user's own; nothing else that can be imported is ever called."""
    if ":" not in name:
        return METHODS[name]
    if code is not None:
        code.check(name)
    found = imported(name, what="method")
    if not (isinstance(found, type) and issubclass(found, Objective | Wrapper)):
        raise InputError(f"method {name!r} is no Objective and no Wrapper of toughen; see docs/add-an-objective.md")
    if fault := _fault(found):
        raise InputError(f"method {name!r} {fault}; see docs/add-an-objective.md")
    return found


def _fault(method: type) -> str | None:
    """What a class of the user's own lacks to be a method, or None."""
    if missing := sorted(getattr(method, "__abstractmethods__", ())):
        return f"does not define {', '.join(missing)}"
    if not is_dataclass(method):
        return "is no dataclass, so its settings could not be stored"
    return None if hasattr(method, "label") else "has no label, its row in tables"


def _epoch(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise InputError(f"branch_epoch is {value!r}; it must be a whole number")


def _branches(document: Mapping[str, Any], code: Permission | None, *, test_step_size: float) -> dict[str, Recipe]:
    branches = document.get("branches") or {}
    if not isinstance(branches, Mapping):
        raise InputError(f"branches is {branches!r}; it must map names to overrides")
    base = {key: value for key, value in document.items() if key not in ("branches", "branch_epoch")}
    # a branch may train with another attack, but is tested like its run
    base["evaluate"] = {**(base.get("evaluate") or {}), "step_size": test_step_size}
    resolved = {}
    for name, changes in branches.items():
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"branch name {name!r} names a folder: use letters, digits, '-' and '_'")
        if not isinstance(changes or {}, Mapping):
            raise InputError(f"branch {name!r} is {changes!r}; it must be a mapping of overrides")
        for key in changes or {}:
            if key in ("model", "data", "branches", "branch_epoch"):
                raise InputError(
                    f"branch {name!r} sets {key}; a branch continues its run, so {key} must stay the run's"
                )
        resolved[name] = resolve(_merged(base, changes or {}), code=code)
    return resolved


def _merged(base: Any, changes: Any) -> Any:
    """Lay ``changes`` over ``base``: mappings key by key, everything else replaced."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return copy.deepcopy(changes)
    return {
        key: _merged(base.get(key), changes[key]) if key in changes else copy.deepcopy(base[key])
        for key in _keys(base, changes)
    }


def _keys(*mappings: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(key for mapping in mappings for key in mapping)


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of ``key.path=value``.

    Raises:
        InputError: It is not of that form, or the value is no YAML.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        example = f"data.path={override} for a folder of images" if Path(override).is_dir() else "train.epochs=2"
        raise InputError(f"override {override!r} is not of the form key.path=value, for example {example}")
    return path, parse_yaml(text, what=f"the value in {override!r}")
