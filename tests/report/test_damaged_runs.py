"""Run folders of anybody's: what is not as toughen writes it is told in one line, and shown as it is."""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from written_runs import make

from toughen.errors import InputError
from toughen.report import compare_runs, comparison_tables, plot_training
from toughen.run_folder import RunFolder

ODD = [None, "[/red]", -1, [], {}, True, "../..", float("nan")]


def changed(document: Any) -> Iterator[Any]:
    """The document with each of its keys missing, or of another kind."""
    for path in paths(document):
        for value in [KeyError, *ODD]:
            other = copy.deepcopy(document)
            place = other
            for key in path[:-1]:
                place = place[key]
            if value is KeyError:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield other


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from paths(value[key], (*path, key))


def shown(*runs: RunFolder) -> str:
    text = StringIO()
    Console(file=text, width=200).print(comparison_tables(compare_runs(runs)))
    return text.getvalue()


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "evals/last/pgd-20.json", "evals/last/clean.json"])
def test_whatever_is_wrong_in_a_run_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    file = run.path / name
    before = file.read_text()
    parse = yaml.safe_load if name.endswith(".yaml") else json.loads
    told = 0
    for content in changed(parse(before.splitlines()[-1] if name.endswith("l") and "log" in name else before)):
        file.write_text(before if name.endswith(".jsonl") else "")
        with file.open("a") as stream:
            stream.write(yaml.safe_dump(content) if name.endswith(".yaml") else json.dumps(content) + "\n")
        for runs in ([run], [run, other], [other, run]):
            with suppress(InputError):  # of one line, as all are
                shown(*runs)
                continue
            told += 1
    assert told


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = make(tmp_path / "[bold] $x_{$ \x1b[2J")
    assert r"[bold] $x_{$ \x1b[2J" in shown(run)
    plot_training(run, tmp_path / "training.png")
    assert (tmp_path / "training.png").exists()
