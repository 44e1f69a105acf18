"""Recipes as nobody would write them: each is a recipe, or a mistake that is told in one line; and none runs code."""

import contextlib
import copy
import inspect
import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toughen.attacks import PGD
from toughen.cli import main
from toughen.config import load_recipe, read_document, recipe_names, resolve
from toughen.data import DataSettings
from toughen.engine import EvaluateSettings, ModelSettings, TrainSettings
from toughen.errors import InputError
from toughen.objectives import METHODS
from toughen.types import ThreatModel

MARK = "executed"
# what would leave a mark if anything took text for code, a name for an address, or a format for a template
CODE = [
    f"__import__('pathlib').Path('{MARK}').touch()",
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"; touch {MARK}",
    "{0.__class__}",
    "%(x)s %s %n",
    "os:system",
    "leaves_a_mark:build",
    "antigravity:fly",
    "../../etc/passwd",
]
ODD = [
    *[None, True, False, 0, 1, -1, 2, 3, 10**6, 10**18, -(10**18), 2**63, 0.5, -0.5, 1e308, 1e-320],
    *[float("nan"), float("inf"), float("-inf"), "", " ", "1", "8/255", "1/0", "0/0", "-1/3", "1e400", "nan", "null"],
    *["\u0000", "a\nb", "\u2028", "\x1b[2J", "[/red]", "$\\frac$", "\u0664", "x" * 5000, "\U0001d4c5", "\u202e"],
    *[[], {}, [[]], [None], {"name": None}, [{"name": "pgd-at"}], [{"name": "clat"}], {"a": {"b": {"c": []}}}],
    *["pgd-at", "trades", "clat", "awp", "swa", "ema", "lora", "twins", "rift", "carry-over", "autolora", "mart"],
    *["clean", "free-at", "fast-at", "rst", "score", "small_cnn", "digits", "cutout", "crop_flip", "none", "pgd-20"],
    *CODE,
]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a document, itself first."""
    found = [path]
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += places(value[key], (*path, key))
    return found


def settings_of(target: Any) -> list[str]:
    return [name for name in inspect.signature(target).parameters if name not in ("args", "kwargs")]


def near(draw: random.Random) -> Any:
    """A value of a kind that settings often have."""
    whole, share = draw.choice([-1, 0, 1, 2, 3, 7, 60, 10**5]), draw.choice([-0.1, 0.0, 0.25, 0.5, 1.0, 1.5, 100.0])
    word = draw.choice(
        [word for word in ODD if isinstance(word, str)] + ["top", "random", "inner", "auto", "mean", "l2"]
    )
    return draw.choice([whole, share, draw.choice([True, False, None]), word, [share, share], [whole], {"name": word}])


def tuned(document: Any, draw: random.Random) -> Any:
    """The document with one setting of one section, whether it stands there or not, or with one more method."""
    sections = {"train": TrainSettings, "data": DataSettings, "threat": ThreatModel, "evaluate": EvaluateSettings}
    sections |= {"model": ModelSettings, "attack": PGD}
    name = draw.choice([*sections, "method", "method"])
    if name == "method" and isinstance(document.get("method"), list):
        method = draw.choice(list(METHODS))
        keys = draw.sample(
            settings_of(METHODS[method]), k=min(len(settings_of(METHODS[method])), draw.choice([0, 1, 2]))
        )
        document["method"].insert(draw.choice([0, 99]), {"name": method, **{key: near(draw) for key in keys}})
        if draw.random() < 0.5:
            document["method"] = document["method"][:1]
    elif name in sections and isinstance(document.get(name), dict):
        document[name][draw.choice(settings_of(sections[name]))] = near(draw)
    return document


def mutated(document: Any, draw: random.Random) -> Any:
    """The document with one change: a value of another kind, or a key that is missing, misspelled or too much."""
    *parents, last = draw.choice(places(document)[1:])
    place = document
    for key in parents:
        place = place[key]
    kind = draw.choice(["odd", "odd", "odd", "missing", "misspelled", "extra", "number", "wrapped", "moved", "method"])
    if kind == "odd":
        place[last] = copy.deepcopy(draw.choice(ODD))
    elif kind == "missing":
        del place[last]
    elif kind == "misspelled" and isinstance(place, dict):
        word = str(last)
        spot = draw.randrange(len(word) + 1)
        place[word[:spot] + draw.choice(["", "x", "_", "É", "\n", "."]) + word[spot + 1 :]] = place.pop(last)
    elif kind == "extra" and isinstance(place, dict):
        place[draw.choice(["epochs", "eval", "__class__", "lr", "k", "name", "", "self", "extends", 3, None])] = 1
    elif kind == "number":
        place[last] = draw.choice([draw.randint(-5, 400), draw.uniform(-2, 2), 10 ** draw.randint(0, 40)])
    elif kind == "wrapped":
        place[last] = draw.choice([[place[last]], {"name": place[last]}, [place[last]] * 3, deep(30)])
    elif kind == "moved":
        place[last] = copy.deepcopy(draw.choice(list(document.values())))
    elif kind == "method" and isinstance(document.get("method"), list):
        document["method"].append({"name": draw.choice([word for word in ODD if isinstance(word, str)])})
    return document


def fuzzed(name: str, draw: random.Random) -> dict[str, Any]:
    document = read_document(name)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if document:
            document = draw.choice([mutated, tuned])(document, draw)
    return document


def check_one_line(error: InputError, given: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1, given
    assert message.isprintable(), given


def fuzz(cases: int, folder: Path) -> Counter[str]:
    """Load fuzzed recipes, as files and as plain values; count what came of them."""
    counts: Counter[str] = Counter()
    names = sorted(recipe_names())

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), st.integers(0, 2**32))
    def one(name: str, seed: int) -> None:
        counts["tried"] += 1
        document = fuzzed(name, random.Random(seed))
        file = folder / "fuzzed.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        try:
            recipe = load_recipe(str(file))
        except InputError as error:
            check_one_line(error, file.read_text())
            counts["refused in one line"] += 1
        else:
            resolve(recipe.document())  # what is stored in the run folder is a recipe as well
            counts["survived"] += 1

    one()
    return counts


def dry_run(cases: int, folder: Path) -> Counter[str]:
    """Run ``toughen train --dry-run`` on fuzzed variants of a recipe that is quick to set up."""
    counts: Counter[str] = Counter()
    draw = random.Random(0)
    while counts["tried"] < cases:
        counts["tried"] += 1
        file = folder / "fuzzed.yaml"
        file.write_text(yaml.safe_dump(fuzzed("digits", draw)), encoding="utf-8")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["train", str(file), "--dry-run"])
        assert status in (0, 2), file.read_text()
        told = [line for line in err.getvalue().splitlines() if line.startswith("toughen: ")]
        assert len(told) == (status == 2), file.read_text()
        assert "Traceback" not in err.getvalue(), file.read_text()
        counts["survived" if status == 0 else "refused in one line"] += 1
    return counts


def tell(counts: Counter[str], what: str) -> None:
    print(
        f"\n{what}: tried {counts['tried']}, survived {counts['survived']}, refused in one line"
        f" {counts['refused in one line']}, lost 0, tracebacks 0"
    )


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, on Python's path with a module that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaves_a_mark.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w').close()\n")
    return tmp_path


def test_a_few_fuzzed_recipes_are_recipes_or_told_in_one_line(watched: Path) -> None:
    counts = fuzz(60, watched) + dry_run(8, watched)

    assert counts["survived"]
    assert counts["refused in one line"]
    assert not (watched / MARK).exists()


@pytest.mark.slow
def test_two_thousand_fuzzed_recipes_are_recipes_or_told_in_one_line(watched: Path) -> None:
    loaded, dry = fuzz(2000, watched), dry_run(300, watched)

    assert loaded["survived"]
    assert dry["survived"]
    assert not (watched / MARK).exists()
    tell(loaded, "fuzzed recipes, loaded")
    tell(dry, "fuzzed recipes, --dry-run")
