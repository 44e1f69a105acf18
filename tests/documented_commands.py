"""The commands of the documentation, checked without the hours that some would take: what they name has to be there."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from toughen.cli import main
from toughen.cli.grammar import make_parser
from toughen.cli.verbs import VERBS
from toughen.config import load_recipe, recipe_names
from toughen.evaluation import parse_attack
from toughen.types import ThreatModel

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# of the system, or of packages that an extra installs
OTHERS = {"cd", "mv", "source", "sbatch", "tensorboard", "trackio", "hf", "sphinx-build", "python3", "pre-commit"}
QUICK = ("list", "compare")


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as words, without comments and what is set before them."""
    pending = ""
    for line in block.splitlines():
        pending += line.removesuffix("\\") if line.endswith("\\") else line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on
            continue
        pending = ""
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield [word for number, word in enumerate(words[:end]) if not (number == 0 and re.match(r"\w+=", word))]
            words = words[end + 1 :]
    assert not pending.strip(), f"{pending!r} does not end"


def check(words: list[str], run: Path) -> None:
    """Check one command; ``run`` stands for the runs that it names."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "torchrun":
        _check_toughen(words[words.index("toughen") + 1 :], run)
    elif program == "toughen":
        _check_toughen(words[1:], run)
    elif program == "python":
        _check_python(words[1:])
    elif program == "pip":
        extras = PROJECT["project"]["optional-dependencies"]
        wanted = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
        assert not set(wanted) - set(extras), f"no such extra: {words}"
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))
    else:
        assert program in OTHERS, f"what is {program}?"


def _check_python(words: list[str]) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] != "-m":
        script = ROOT / words[0]
        assert script.is_file(), f"no such script: {words[0]}"
        # some take the options of `toughen evaluate` too
        sources = (*script.parent.glob("*.py"), ROOT / "src" / "toughen" / "cli" / "grammar.py")
        beside = "".join(file.read_text() for file in sources)
        assert not [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in beside], words


def _check_toughen(words: list[str], run: Path) -> None:
    words = [_filled(word, run) for word in words if "..." not in word and not word.startswith("[")]
    if "--print-completion" in words:
        return
    options, rest = make_parser(VERBS).parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")], f"unknown options {rest}"
    if options.verb == "train" and not options.resume:
        given = [*options.words, *rest]
        if given and "=" not in given[0]:
            name, *given = given
            assert name in recipe_names(), f"no recipe {name}"
        else:
            name = "digits"
        load_recipe(name, given)
    elif options.verb in ("evaluate", "transfer"):
        for name in options.attacks.split(","):
            parse_attack(name, threat=ThreatModel(eps=0.1), step_size=0.01)
    elif options.verb in QUICK or (options.verb == "sweep" and options.dry_run):
        assert main(words) == 0


def _filled(word: str, run: Path) -> str:
    """A word whose placeholders stand for something that is there."""
    word = re.sub(r"\b(RUN|OTHER|runs)\b(/[\w./-]+)?(?=$|,|}|\s)", str(run), word)
    word = re.sub(r"\bmy_package\.nets:build\b", "small_cnn", word)
    names = {"RECIPE": "digits", "SEED": "0", "MODEL": "resnet18", "table1_digits/NAME": "table1_digits/trades"}
    weights = str(run / "checkpoints" / "last" / "weights.safetensors")
    for name, value in {**names, "model.weights=FILE": f"model.weights={weights}"}.items():
        word = re.sub(rf"(?<![\w/]){re.escape(name)}\b", value, word)
    return word.split("|")[0] if re.fullmatch(r"\w+(\|\w+)+", word) else word
