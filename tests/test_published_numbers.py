"""What the pages print is what the files in ``results/`` hold."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]


def read(name):
    return json.loads((ROOT / "results" / name).read_text())


def lines(page, heading, beginning):
    """The rows of the tables in the section of that heading that begin so."""
    section = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith(f"| {beginning}")]


def check(line, expected, *, first=0):
    """The numbers of a printed row, its last ones if ``first`` is 0, are the expected ones, as far as it has digits."""
    found = [float(number) for number in re.findall(r"(?<![\d.])\d+\.\d+", line)]
    found = found[:first] if first else found[-len(expected) :]
    assert found == pytest.approx(expected, abs=0.0501), line


def percent(rows, checkpoint, attack):
    return [100 * row[checkpoint][attack] for row in rows]


def middle_and_range(rows):
    values = [percent(rows, "last", attack) for attack in ("clean", "pgd-20")]
    return [number for value in values for number in (mean(value), min(value), max(value))]


def cost(rows):
    """Printed as 100 % and 1 where all is trained."""
    share, operations = 100 * rows[0]["trainable_share"], rows[0]["flops_relative_to_pgd_at"]
    return [] if share == 100 else [share, operations]


TABLE_1 = lines("docs/results.md", "Every method on digits", "`")


@pytest.mark.parametrize("line", TABLE_1, ids=[line.split("|")[1].strip() for line in TABLE_1])
def test_every_method_on_digits(line):
    recipe, branch = re.match(r"\| `([\w-]+)` ([\w-]+) \|", line).groups()
    key = (f"table1_digits/{recipe}", branch)
    rows = [row for row in read("table1_digits.json")["rows"] if (row["recipe"], row["branch"]) == key]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2]
    check(line, [*middle_and_range(rows), mean(row["flops_relative_to_pgd_at"] for row in rows)])


@pytest.mark.parametrize(
    ("branch", "beginning"),
    [
        ("start", "epoch 30, PGD-AT"),
        ("pgd-at", "epoch 60, PGD-AT continued"),
        ("clat", "epoch 60, CLAT, base = inner"),
        ("clat-eq6", "epoch 60, CLAT, Eq. 6, λ auto, k = 1, rate x 0.1"),
        ("clat-eq6-rate1", "epoch 60, CLAT, Eq. 6, λ auto, k = 1, rate continued"),
    ],
)
def test_where_nothing_overfits(branch, beginning):
    rows = [row for run in read("digits.json")["runs"] for row in run["rows"] if row["branch"] == branch]
    (line,) = lines("docs/results.md", "Where nothing overfits", beginning)
    check(line, middle_and_range(rows) + cost(rows))


@pytest.mark.parametrize(
    ("branch", "beginning"),
    [
        ("start", "epoch 60, PGD-AT"),
        ("pgd-at", "epoch 120, PGD-AT continued"),
        ("clat", "epoch 120, CLAT, base = inner"),
        ("clat-eq6", "epoch 120, CLAT, Eq. 6"),
    ],
)
def test_where_robust_overfitting_is_strong(branch, beginning):
    rows = [row for run in read("cifar10_tiny.json")["runs"] for row in run["rows"] if row["branch"] == branch]
    columns = [(attack, checkpoint) for attack in ("clean", "pgd-10") for checkpoint in ("last", "best")]
    (line,) = lines("docs/results.md", "Where robust overfitting is strong", beginning)
    check(line, [100 * row[checkpoint][attack] for row in rows for attack, checkpoint in columns] + cost(rows))


STUDY = read("study_tiny.json")["rows"]


@pytest.mark.parametrize("branch", sorted({row["branch"] for row in STUDY}))
def test_all_continuations(branch):
    rows = [row for row in STUDY if row["branch"] == branch]
    (line,) = lines("results/REPORT.md", "All continuations", f"`{branch}`")
    assert int(line.split("|")[2]) == len(rows)
    check(line, [mean(percent(rows, c, attack)) for c in ("last", "best") for attack in ("clean", "pgd-10")], first=4)
