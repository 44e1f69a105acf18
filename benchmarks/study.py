"""Train and evaluate the runs of a sweep in pieces, for a machine that is at hand for minutes at a time.

python benchmarks/study.py cifar10_resnet18_study --data FOLDER --minutes 8 --json results/study_resnet18.json

The same command goes on where it was stopped: first the runs, seed by seed, then the attacks of --attacks on the last
and the best checkpoint of each. Before each piece it says what is next, what it decides, and about how long it takes,
as far as pieces of its kind were timed. The file of results is written anew after each piece. It holds all networks
that are trained, also of a run whose other branches are still to come, with all that earlier commands measured: so
--attacks pgd-50 --samples 10000 and --attacks standard --samples 1000 are two commands.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from collect import member
from told import positive, told

from toughen.cli import main as toughen
from toughen.config import resolve
from toughen.engine import Interrupted
from toughen.errors import InputError, unknown
from toughen.run_folder import RunFolder
from toughen.statistics import SeedSummary, compare_seeds, over_seeds
from toughen.sweep import Sweep, SweepFolder, read_sweep, stopped_after, train_serially

CHECKPOINTS = ("last", "best")
START = "start"  # what the table calls a run where it branched


class Trained(NamedTuple):
    """A network that is trained and tested.

    Attributes:
        group: What the runs are called that differ from its run in the seed alone.
        seed: Its seed.
        branch: ``"start"``, or the name of the branch.
        run: Its folder.
        attacked: The folder of what ``--attacks`` measured of it.
    """

    group: str
    seed: int
    branch: str
    run: RunFolder
    attacked: RunFolder


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


def trained(folder: SweepFolder, sweep: Sweep) -> Iterator[Trained]:
    """Iterate over the networks that are trained and tested, run by run."""
    for run in sweep.runs:
        found = RunFolder(folder.path / run.name)
        if not found.config_file.is_file():
            continue
        for branch, part in [(START, found), *((one.path.name, one) for one in found.branches())]:
            if all(set(run.recipe.evaluate.attacks) <= part.evaluations(name).keys() for name in CHECKPOINTS):
                place = folder.path / "attacked" / part.path.relative_to(folder.path)
                yield Trained(str(Path(run.name).parent), run.seed, branch, part, RunFolder(place))


def attack(network: Trained, names: str, samples: int) -> None:
    """Attack both checkpoints of a network; what is there already is read."""
    for checkpoint in CHECKPOINTS:
        place = network.attacked.evals(checkpoint)
        place.mkdir(parents=True, exist_ok=True)
        words = ["evaluate", str(network.run.path), "--checkpoint", checkpoint, "--attacks", names]
        with redirect_stdout(sys.stderr):
            status = toughen([*words, "--samples", str(samples), "--out", str(place)])
        if status == 130:
            raise Interrupted
        if status:
            raise InputError(f"{network.run.path} could not be attacked with {names}, as said above")


def measured(network: Trained, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Return what ``--attacks`` measured of a checkpoint, by attack."""
    return network.attacked.evaluations(checkpoint)


def minutes_of(names: str, samples: int, networks: Sequence[Trained]) -> str:
    """Say about how long the attacks on one network take, as far as they were timed on another one."""
    times = []
    for network in networks:
        found = [one for checkpoint in CHECKPOINTS for one in measured(network, checkpoint).values()]
        alike = [one for one in found if one["attack"] in names.split(",") and one["n"] == samples]
        if len(alike) == len(CHECKPOINTS) * len(names.split(",")):
            times.append(sum(stage["seconds"] for one in alike for stage in one["stages"]))
    return f", about {statistics.median(times) / 60:.1f} minutes" if times else ""


def gather(networks: Sequence[Trained]) -> list[dict[str, Any]]:
    """Describe what is trained, a row for each network."""
    rows = []
    for network in networks:
        whole = network.run.parent_run or network.run
        attacked = {
            checkpoint: {
                name: {"accuracy": one["accuracy"], "n": one["n"]}
                for name, one in measured(network, checkpoint).items()
            }
            for checkpoint in CHECKPOINTS
        }
        known = {"run": network.group, "seed": network.seed, "commit": whole.provenance()["commit"]}
        rows.append({**known, **member(network.run, network.branch), "attacked": attacked})
    return rows


def write(file: Path | None, command: str, networks: Sequence[Trained]) -> None:
    """Write the file of results."""
    if file is None or not networks:
        return
    facts = networks[0].run.provenance()
    kept = ("device", "threads", "cores", "python", "system", "versions", "precision")
    provenance = {key: facts[key] for key in kept}
    file.write_text(
        json.dumps({"command": command, "provenance": provenance, "rows": gather(networks)}, indent=1) + "\n"
    )


def accuracies(rows: Sequence[dict[str, Any]], branch: str, checkpoint: str, name: str) -> dict[int, float]:
    """Return accuracy by seed, in percent."""
    found = {}
    for row in rows:
        known = {**row[checkpoint], **{k: v["accuracy"] for k, v in row["attacked"][checkpoint].items()}}
        if row["branch"] == branch and name in known:
            found[row["seed"]] = 100 * known[name]
    return found


def told_by(rows: Sequence[dict[str, Any]], against: str | None) -> str:
    """Compare each branch with one, at its last and at its best checkpoint, as Markdown; paired by seed."""
    if not rows:
        return "nothing is trained yet"
    groups = dict.fromkeys(row["run"] for row in rows)
    tables = [f"## {group}\n\n{_told([row for row in rows if row['run'] == group], against)}" for group in groups]
    return "\n\n".join(tables)


def _told(rows: Sequence[dict[str, Any]], against: str | None) -> str:
    branches = list(dict.fromkeys(row["branch"] for row in rows))
    against = against or branches[min(1, len(branches) - 1)]
    names = [key for key in rows[0]["last"] if key != "epoch"]
    names += dict.fromkeys(key for row in rows for key in row["attacked"]["last"] if key not in names)
    lines = ["mean over seeds; in brackets the 95 % interval of the mean difference, paired by seed"]
    for name in names:
        lines += [
            "",
            f"| {name} | seeds | last | best | last - {against} last | last - {against} best |",
            "|---|---|---|---|---|---|",
        ]
        reference = {checkpoint: accuracies(rows, against, checkpoint, name) for checkpoint in CHECKPOINTS}
        for branch in branches:
            last, best = (accuracies(rows, branch, checkpoint, name) for checkpoint in CHECKPOINTS)
            if last:
                differences = [difference(last, reference[checkpoint]) for checkpoint in CHECKPOINTS]
                cells = (branch, str(len(last)), mean(last), mean(best), *differences)
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def check_branches(sweep: Sweep, names: Sequence[str], flag: str) -> None:
    """Refuse a branch that no run of the study has.

    Raises:
        InputError: Says what there is.
    """
    there = dict.fromkeys([START, *(branch for run in sweep.runs for branch in run.recipe.branches)])
    for name in names:
        if name not in there:
            raise unknown(f"branch in {flag}:", name, there)


def command_of(words: Sequence[str], data: str | None) -> str:
    """Return what was typed, with the folder of the images left to the reader."""
    return shlex.join(["python", "benchmarks/study.py", *("FOLDER" if word == data else word for word in words)])


def main() -> None:
    """Train, attack, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file for toughen sweep, or one that comes with the package")
    parser.add_argument("--data", metavar="FOLDER", help="the images (default: as in the file)")
    parser.add_argument("--out", type=Path, help="the folder of the runs (default: runs/NAME)")
    parser.add_argument("--minutes", type=float, help="stop then (default: when all is done)")
    parser.add_argument("--attacks", help="on each network when all are trained, for example pgd-50,standard")
    parser.add_argument("--samples", type=positive, default=1000, help="test images for them (default: 1000)")
    parser.add_argument("--only", nargs="+", default=[], metavar="BRANCH", help="what to attack (default: all)")
    parser.add_argument("--against", metavar="BRANCH", help="what all are compared with (default: the first branch)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sweep = study(options.file, options.data)
    check_branches(sweep, options.only, "--only")
    check_branches(sweep, [options.against] if options.against else [], "--against")
    folder = SweepFolder(options.out or Path("runs") / sweep.name)
    decides = (sweep.runs[0].recipe.description.splitlines() or [""])[0]

    def piece(text: str) -> None:
        write(options.json, command, list(trained(folder, sweep)))
        say(f"{text}. It decides: {decides}")

    command = command_of(sys.argv[1:], options.data)
    try:
        with stopped_after(options.minutes):
            train_serially(sweep, folder, say=lambda _, text: piece(text))
            networks = list(trained(folder, sweep)) if options.attacks else []
            for network in networks:
                if not options.only or network.branch in options.only:
                    takes = minutes_of(options.attacks, options.samples, networks)
                    piece(f"next: {options.attacks} on {options.samples} images, {network.run.path}{takes}")
                    attack(network, options.attacks, options.samples)
    finally:
        write(options.json, command, list(trained(folder, sweep)))
    print(told_by(gather(list(trained(folder, sweep))), options.against))


if __name__ == "__main__":
    sys.exit(told(main))
