"""The file of a sweep: a recipe, a grid of settings, seeds; and the runs that it means, each checked."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from toughen.config import Permission, build, extended, resolve, set_keys
from toughen.config.code import VARIABLE, allowed_everywhere
from toughen.documents import parse_yaml
from toughen.engine import Recipe
from toughen.errors import InputError, unknown
from toughen.run_folder import file_name
from toughen.sweep.naming import short_keys, value_names

_LONGEST = 200  # bytes of the name of a folder; file systems take 255


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one run takes of a machine.

    Args:
        cpus: Cores, above 0; the run computes with as many threads (at least one).
        gpus: A GPU, a share of one in (0, 1), or 0: then the run sees none.

    Raises:
        InputError: A number is out of its range.
    """

    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.cpus <= 4096 or (self.cpus > 1 and self.cpus % 1):
            raise InputError(f"resources.cpus is {self.cpus:g}; it must be a whole number of cores, or a share of one")
        if not 0 <= self.gpus <= 1:
            raise InputError(
                f"resources.gpus is {self.gpus:g}; a run of a sweep takes 0 to 1 (one run on several GPUs is for"
                " torchrun and `toughen train`)"
            )

    @property
    def threads(self) -> int:
        """Threads that a run computes with."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Of its folder: ``WHAT-DIFFERS/seed-N``.
        seed: Of its training.
        changes: What it sets over the recipe, by dotted key; without the seed.
        recipe: All of its settings.
    """

    name: str
    seed: int
    changes: Mapping[str, Any]
    recipe: Recipe

    @cached_property
    def document(self) -> dict[str, Any]:
        """Every setting as a plain value, as the ``config.yaml`` of the run will hold it."""
        return self.recipe.document()

    @property
    def epochs(self) -> int:
        """Epochs to train, those of its branches included."""
        recipe = self.recipe
        return recipe.stop_epoch + sum(one.train.epochs - recipe.stop_epoch for one in recipe.branches.values())


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Attributes:
        name: Of its folder under ``runs/``.
        file: That it was read from, as it was given.
        runs: In the order in which they start.
        resources: Of each run.
        retries: How often a run that died is continued from its checkpoint.
        allow_code: Packages of whose code recipes may name methods and models.
    """

    name: str
    file: str
    runs: tuple[Run, ...]
    resources: Resources
    retries: int
    allow_code: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the processes of its runs."""
        allowed = [*self.allow_code, *allowed_everywhere()]
        return {
            "OMP_NUM_THREADS": str(self.resources.threads),
            **({} if self.resources.gpus else {"CUDA_VISIBLE_DEVICES": ""}),
            **({VARIABLE: ",".join(allowed)} if allowed else {}),
        }


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The keys of the file, of the right types."""

    recipe: str | dict[str, Any]
    name: str | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    seeds: int | list[int] | None = None
    resources: Resources = field(default_factory=Resources)
    retries: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.retries <= 100:
            raise InputError(f"retries is {self.retries}; it must be 0 to 100")
        if isinstance(self.seeds, int) and not 1 <= self.seeds <= 10_000:
            raise InputError(f"seeds is {self.seeds}; give how many (1 to 10000), or a list such as [0, 1, 2]")
        if isinstance(self.seeds, list) and (
            not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)
        ):
            raise InputError(f"seeds is {self.seeds}; list whole numbers >= 0, each once, such as [0, 1, 2]")
        if self.name is not None:
            _check_folder_name("name", self.name)
        taken: dict[str, str] = {}
        for name in self.runs:
            _check_folder_name("run name", name)
            if (twin := taken.setdefault(name.casefold(), name)) != name:
                raise InputError(f"run names {twin!r} and {name!r} are one folder on some file systems; rename one")
        for key, values in self.grid.items():
            if not values:
                raise InputError(f"grid.{key} is empty; list at least one value, or leave the key out")
            for number, value in enumerate(values):
                if value in values[:number]:
                    raise InputError(f"grid.{key} lists {value!r} twice; the runs would be duplicates: list it once")

    @property
    def all_seeds(self) -> list[int | None]:
        """The seeds, one by one; without any, that of the recipe (None)."""
        if self.seeds is None:
            return [None]
        return [*range(self.seeds)] if isinstance(self.seeds, int) else [*self.seeds]


def read_sweep(name: str, *, allow_code: Sequence[str] = ()) -> Sweep:
    """Read the file of a sweep and check every run that it means.

    Args:
        name: The path of a YAML file, or a sweep that comes with the package.
        allow_code: Packages of whose code the file may name methods and models, besides those in the variable
            ``TOUGHEN_ALLOW_CODE``.

    Raises:
        InputError: There is no such file, a key or a value of it is wrong, or two of its runs are the same.
    """
    document = _read(name)
    try:
        content = build(_Content, document, path="sweep")
        rows = list(_rows(content))
        sections = {"extends": content.recipe} if isinstance(content.recipe, str) else content.recipe
        base = extended(sections, source=name)
        title = content.name or file_name(Path(name).stem)
        _check_folder_name("without the key name, its own name", title)
    except InputError as error:
        raise InputError(f"sweep {name}: {error}") from None
    code = Permission.of_user(f"sweep {name}", allow_code)
    runs: list[Run] = []
    for row, changes in rows:
        for seed in content.all_seeds:
            runs.append(_run(base, row or title, changes, seed, code=code, sweep=name))
    _refuse_duplicates(runs, sweep=name)
    return Sweep(title, name, tuple(runs), content.resources, content.retries, tuple(allow_code))


def _shelf() -> Traversable:
    return files("toughen.sweep") / "files"


def sweep_names() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _shelf().iterdir() if entry.name.endswith(".yaml"))


def _read(name: str) -> dict[str, Any]:
    """The file as plain values."""
    file: Path | Traversable = Path(name)
    if name in sweep_names():
        file = _shelf() / f"{name}.yaml"
    elif not name.endswith((".yaml", ".yml")):
        raise unknown("sweep", name, sweep_names(), hint="or give the path of a .yaml file")
    try:
        document = parse_yaml(file.read_text(encoding="utf-8"), what=f"sweep file {name}")
    except FileNotFoundError:
        raise InputError(f"no sweep file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file {name} is not a text file that can be read: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"sweep file {name} must be a mapping with the keys recipe, grid, runs, seeds")
    return document


def _rows(content: _Content) -> Iterator[tuple[str, dict[str, Any]]]:
    """What differs between runs apart from seeds: a name, empty where nothing does, and the changes."""
    differing = [key for key, values in content.grid.items() if len(values) > 1]
    short = short_keys(differing)
    names = {key: value_names(short[key], content.grid[key]) for key in differing}
    choices = [list(enumerate(values)) for values in content.grid.values()]
    for run, overrides in (content.runs or {"": None}).items():
        own = list(_flat(overrides or {}))
        for chosen in itertools.product(*choices):
            picked = dict(zip(content.grid, chosen, strict=True))
            changes = [*own, *(pair for key, (_, value) in picked.items() for pair in _flat({key: value}))]
            _refuse_overwritten([key for key, _ in changes], run=run)
            parts = [run] if run else []
            name = ",".join([*parts, *(names[key][picked[key][0]] for key in differing)])
            if _size(name) > _LONGEST:
                raise InputError(
                    f"a run would be named {name[:40]}... ({_size(name)} bytes, at most {_LONGEST}); name the rows"
                    " yourself, with the key runs in place of grid"
                )
            yield name, dict(changes)


def _refuse_overwritten(keys: Sequence[str], *, run: str) -> None:
    """Refuse a run that would be called by a setting which a later one replaces."""
    for number, key in enumerate(keys):
        if key == "train.seed":
            raise InputError("train.seed is no setting of a grid; list the seeds under the key seeds")
        for before in keys[:number]:
            if before == key or before.startswith(f"{key}."):
                raise InputError(
                    f"{f'run {run!r}' if run else 'the grid'} sets {before} and then {key}, which leaves nothing of it;"
                    " leave out one of them"
                )


def _run(
    base: Mapping[str, Any],
    row: str,
    changes: Mapping[str, Any],
    seed: int | None,
    *,
    code: Permission,
    sweep: str,
) -> Run:
    document = copy.deepcopy(dict(base))
    name = row if seed is None else f"{row}/seed-{seed}"
    try:
        set_keys(document, changes.items() if seed is None else [*changes.items(), ("train.seed", seed)])
        recipe = resolve(document, code=code)
    except InputError as error:
        given = ", ".join(f"{key}={value}" for key, value in changes.items())
        raise InputError(f"sweep {sweep}, run {name}{f' ({given})' if given else ''}: {error}") from None
    return Run(f"{row}/seed-{recipe.train.seed}", recipe.train.seed, changes, recipe)


def _refuse_duplicates(runs: Sequence[Run], *, sweep: str) -> None:
    names: dict[str, str] = {}
    for run in runs:
        twin = names.setdefault(json.dumps(run.document, sort_keys=True), run.name)
        if twin != run.name:
            raise InputError(
                f"sweep {sweep}: runs {twin} and {run.name} are the same run, in every setting; drop one, or let them"
                " differ"
            )


def _flat(sections: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; so a mapping changes what it names, and only branches are replaced as a whole."""
    for key, value in sections.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping) and path != "branches":
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _check_folder_name(what: str, name: str) -> None:
    # no "=", since `toughen train` takes a word with one for an override
    if not name or name != file_name(name) or "=" in name or name.startswith((".", "-")) or _size(name) > _LONGEST:
        raise InputError(
            f"{what} {name!r} names a folder: use letters, digits, '-', '_', '+' and '.', at most {_LONGEST} bytes, and"
            " begin with none of '-' and '.'"
        )


def _size(name: str) -> int:
    return len(name.encode())
