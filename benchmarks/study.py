"""Train and evaluate the runs of a sweep in pieces, for a machine that is at hand for minutes at a time.

python benchmarks/study.py cifar10_resnet18_study --data FOLDER --minutes 8 --json results/study_resnet18.json

The same command goes on where it was stopped: first the runs, seed by seed, then the attacks of --attacks on the last
and the best checkpoint of each. Before each piece it says what is next, what it decides, and about how long it takes.
The file of results is written anew after each piece, and holds what is finished.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from collect import member
from told import positive, told

from toughen.cli import main as toughen
from toughen.config import resolve
from toughen.engine import Interrupted
from toughen.errors import InputError
from toughen.run_folder import RunFolder
from toughen.statistics import SeedSummary, compare_seeds, over_seeds
from toughen.sweep import Sweep, SweepFolder, read_sweep, stopped_after, train_serially

CHECKPOINTS = ("last", "best")


def study(file: str, data: str | None) -> Sweep:
    """Read the sweep, with its images from a folder where one is given."""
    sweep = read_sweep(file)
    if data is None:
        return sweep
    documents = [{**run.document, "data": {**run.document["data"], "path": data}} for run in sweep.runs]
    runs = [replace(run, recipe=resolve(one)) for run, one in zip(sweep.runs, documents, strict=True)]
    return replace(sweep, runs=tuple(runs))


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")


def finished(folder: SweepFolder, sweep: Sweep) -> Iterator[tuple[int, RunFolder]]:
    """Iterate over the runs that are finished, with their seeds."""
    for run in sweep.runs:
        found = RunFolder(folder.path / run.name)
        if found.finished:
            yield run.seed, found


def parts(run: RunFolder) -> list[tuple[str, RunFolder]]:
    """The run where it branched, and its branches."""
    return [("start", run), *((branch.path.name, branch) for branch in run.branches())]


def attack(run: RunFolder, names: str, samples: int, kept: Path) -> dict[str, dict[str, Any]]:
    """Attack both checkpoints of a network; what is there already is read."""
    found = {}
    for checkpoint in CHECKPOINTS:
        place = kept / checkpoint
        place.mkdir(parents=True, exist_ok=True)
        words = ["evaluate", str(run.path), "--checkpoint", checkpoint, "--attacks", names, "--samples", str(samples)]
        with redirect_stdout(sys.stderr):
            status = toughen([*words, "--out", str(place), "--json", str(place) + ".json"])
        if status == 130:
            raise Interrupted
        if status:
            raise InputError(f"{run.path} could not be attacked with {names}, as said above")
        results = json.loads(Path(str(place) + ".json").read_text())
        found[checkpoint] = {name: {"accuracy": one["accuracy"], "n": one["n"]} for name, one in results.items()}
    return found


def gather(runs: Sequence[tuple[int, RunFolder]], attacked: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe what is finished, a row for each network."""
    rows = []
    for seed, run in runs:
        commit = run.provenance()["commit"]
        for name, part in parts(run):
            row = {"seed": seed, "commit": commit, **member(part, name)}
            rows.append(row | {"attacked": attacked.get(str(part.path), {})})
    return rows


def write(file: Path | None, command: str, runs: Sequence[tuple[int, RunFolder]], attacked: dict[str, Any]) -> None:
    """Write the file of results."""
    if file is None or not runs:
        return
    facts = runs[0][1].provenance()
    kept = ("device", "threads", "cores", "python", "system", "versions", "precision")
    provenance = {key: facts[key] for key in kept}
    file.write_text(
        json.dumps({"command": command, "provenance": provenance, "rows": gather(runs, attacked)}, indent=1) + "\n"
    )


def accuracies(rows: Sequence[dict[str, Any]], branch: str, checkpoint: str, name: str) -> dict[int, float]:
    """Return accuracy by seed, in percent."""
    found = {}
    for row in rows:
        measured = {**row[checkpoint], **{k: v["accuracy"] for k, v in row["attacked"].get(checkpoint, {}).items()}}
        if row["branch"] == branch and name in measured:
            found[row["seed"]] = 100 * measured[name]
    return found


def told_by(rows: Sequence[dict[str, Any]], against: str | None) -> str:
    """Compare each branch with one, at its last and at its best checkpoint, as Markdown; paired by seed."""
    if not rows:
        return "nothing is finished yet"
    branches = list(dict.fromkeys(row["branch"] for row in rows))
    against = against or branches[1]
    names = [key for key in rows[0]["last"] if key != "epoch"]
    names += dict.fromkeys(key for row in rows for key in row["attacked"].get("last", {}) if key not in names)
    lines = []
    for name in names:
        lines += [
            "",
            f"| {name} | last | best | last - {against} last | last - {against} best |",
            "|---|---|---|---|---|",
        ]
        reference = {checkpoint: accuracies(rows, against, checkpoint, name) for checkpoint in CHECKPOINTS}
        for branch in branches:
            last, best = (accuracies(rows, branch, checkpoint, name) for checkpoint in CHECKPOINTS)
            if last:
                differences = [difference(last, reference[checkpoint]) for checkpoint in CHECKPOINTS]
                lines.append("| " + " | ".join((branch, mean(last), mean(best), *differences)) + " |")
    seeds = len({row["seed"] for row in rows})
    return (
        f"{seeds} seeds; mean, and in brackets the 95 % interval of the mean difference, paired by seed\n"
        + "\n".join(lines)
    )


def mean(found: dict[int, float]) -> str:
    """Write mean and standard deviation."""
    summary = over_seeds(list(found.values()))
    return f"{summary.mean:.1f}" + ("" if summary.sd is None else f" (sd {summary.sd:.1f})")


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Write the mean difference over the seeds that both have."""
    both = first.keys() & second.keys()
    if first == second or not both:
        return ""
    summary: SeedSummary = compare_seeds({s: first[s] for s in both}, {s: second[s] for s in both})
    interval = summary.interval
    return f"{summary.mean:+.1f}" + ("" if interval is None else f" [{interval.low:+.1f}, {interval.high:+.1f}]")


def main() -> None:
    """Train, attack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file for toughen sweep, or one that comes with the package")
    parser.add_argument("--data", metavar="FOLDER", help="the images (default: as in the file)")
    parser.add_argument("--out", type=Path, help="the folder of the runs (default: runs/NAME)")
    parser.add_argument("--minutes", type=float, help="stop then (default: when all is done)")
    parser.add_argument("--attacks", help="on each network when all are trained, for example pgd-50,standard")
    parser.add_argument("--samples", type=positive, default=1000, help="test images for them (default: 1000)")
    parser.add_argument("--only", nargs="+", help="branches to attack (default: all)")
    parser.add_argument("--against", metavar="BRANCH", help="what all are compared with (default: the first branch)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sweep = study(options.file, options.data)
    folder = SweepFolder(options.out or Path("runs") / sweep.name)
    command = f"python benchmarks/study.py {options.file}"
    attacked: dict[str, Any] = {}
    try:
        with stopped_after(options.minutes):
            purpose = sweep.runs[0].recipe.description.splitlines()
            train_serially(sweep, folder, say=lambda text: say(f"{text}. It decides: {purpose[0] if purpose else ''}"))
            for _, run in finished(folder, sweep):
                for name, part in parts(run):
                    if options.attacks and (options.only is None or name in options.only):
                        place = folder.path / "attacked" / part.path.relative_to(folder.path)
                        say(f"next: {options.attacks} on {options.samples} images, {part.path}")
                        attacked[str(part.path)] = attack(part, options.attacks, options.samples, place)
    finally:
        runs = list(finished(folder, sweep))
        write(options.json, command, runs, attacked)
    print(told_by(gather(runs, attacked), options.against))


if __name__ == "__main__":
    sys.exit(told(main))
