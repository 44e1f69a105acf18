"""The verb ``reproduce``: tables and figures of the paper, trained, measured and filled in."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.table import Table

from toughen.cli.console import note, out, say
from toughen.cli.files import check_folder, check_output, write
from toughen.cli.sweeping import check_devices
from toughen.config import parse_override
from toughen.data import parse_spec
from toughen.engine import Interrupted
from toughen.errors import InputError, unknown
from toughen.paper import PUBLISHED, SCALES, Bench, Piece, Plan, draw_figure, fill, make_plan, pieces, sweep_document
from toughen.paper.fill import shown, write_table
from toughen.sweep import Address, Resources, Run, SweepFolder, stopped_after, train_all, train_serially


def run_reproduce(options: argparse.Namespace) -> None:
    """Train what tables and figures need, measure it, and print them; the same command goes on after a stop."""
    wanted = list(dict.fromkeys(piece for name in options.pieces for piece in pieces(name)))
    scale = SCALES[options.scale]
    seeds = scale.seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; it must be at least 1")
    _check_options(options)
    check_output(options.sweep, ".yaml", ".yml")
    clat = dict(parse_override(setting) for setting in options.clat)
    paths = dict(_local_copy(spec) for spec in options.data)
    if options.weights and not scale.published:
        raise InputError(f"--weights has no place at --scale {scale.name}, which trains all networks itself")
    weights = dict(_weights(text) for text in options.weights)
    resources = Resources(cpus=options.cpus or 1, gpus=options.gpus or 0)
    plan = make_plan(wanted, scale, seeds=seeds, clat=clat, paths=paths, weights=weights, resources=resources)
    folder = Path(options.out or Path("runs") / f"paper-{scale.name}")
    for network, reason in plan.impossible.items():
        note(f"left out: {network.dataset} {network.model} {network.base}: {reason}")
    if options.dry_run:
        out.print(_planned(plan))
        return
    if options.sweep:
        content = sweep_document(plan, seeds=seeds)
        write(options.sweep, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120).rstrip())
        words = ["toughen", "sweep", options.sweep, "--out", str(folder)]
        say(f"train with: {shlex.join(words)}; then the same command without --sweep fills in what is there")
        return
    check_folder(str(folder))
    bench = Bench(folder, scale, clat, paths, weights, options.checkpoint)
    try:
        with stopped_after(options.minutes):
            failed = _train(plan, folder, options)
            _fill(wanted, bench, seeds)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted("What is done is kept. Continue with the same command") from None
    if failed:
        raise InputError(f"{_told(failed)}; the same command tries them again")


def _train(plan: Plan, folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Train what is not trained yet; returns the runs that failed, by reason."""
    if not plan.sweep.runs:
        return {}

    def tell(run: Run, text: str) -> None:
        say(f"{text} (for {', '.join(map(str, plan.needed_by[_without_seed(run)]))})")

    if options.workers is None:
        runs = train_serially(plan.sweep, SweepFolder(folder), say=tell)
    else:
        check_devices(plan.sweep, "--gpus")
        runs = train_all(plan.sweep, SweepFolder(folder), Address(options.address, options.workers))
    failed: dict[str, list[str]] = {}
    for one in runs:
        if one.state == "failed":
            failed.setdefault(one.message, []).append(one.run.name)
    return failed


def _told(failed: Mapping[str, Sequence[str]]) -> str:
    """Each reason once, with the first run that it stopped."""
    count = sum(map(len, failed.values()))
    reasons = [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in failed.items()
    ]
    return f"{count} run{'s' * (count != 1)} failed: {'; '.join(reasons)}"


def _fill(wanted: Sequence[Piece], bench: Bench, seeds: int) -> None:
    for piece in wanted:
        if piece.kind == "figure":
            file, missing = draw_figure(piece.number, bench, seeds=range(seeds))
            out.print(f"Figure {piece.number}: {file}", highlight=False, markup=False, soft_wrap=True)
            for line in missing:
                note(f"not measured: {line}")
            continue
        rows = fill(piece.number, bench, seeds=range(seeds))
        file = write_table(piece.number, rows, bench, seeds=range(seeds))
        out.print(shown(piece.number, rows, bench))
        say(f"written to {file}")


def _planned(plan: Plan) -> Table:
    """The runs, what goes on from each, and what needs it."""
    table = Table(title=f"{plan.sweep.name}: {len(plan.sweep.runs)} runs")
    for heading in ("run", "epochs", "goes on as", "seeds", "for"):
        table.add_column(heading, overflow="fold")
    rows: dict[str, list[int]] = {}
    for run in plan.sweep.runs:
        rows.setdefault(_without_seed(run), []).append(run.seed)
    first = {_without_seed(run): run for run in reversed(plan.sweep.runs)}
    for name, seeds in rows.items():
        run = first[name]
        branches = ", ".join(run.recipe.branches)
        needed = ", ".join(map(str, plan.needed_by[name]))
        table.add_row(name, str(run.epochs), branches, f"{min(seeds)}-{max(seeds)}", needed)
    return table


def _without_seed(run: Run) -> str:
    return run.name.rpartition("/")[0]


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect beside others."""
    given = [
        name for name in ("address", "cpus", "gpus", "minutes", "sweep", "workers") if vars(options)[name] is not None
    ]
    for flag, trains in (("--dry-run", not options.dry_run), ("--sweep", options.sweep is None)):
        odd = [name for name in given if name in ("minutes", "workers") or (name == "sweep" and flag != "--sweep")]
        if odd and not trains:
            raise InputError(f"{flag} trains nothing: give no --{' and no --'.join(odd)} with it")
    on_ray = [name for name in given if name == "address" or (name in ("cpus", "gpus") and options.sweep is None)]
    if on_ray and options.workers is None:
        raise InputError(f"--{on_ray[0]} is for runs on Ray; give --workers N too")
    Address(options.address, options.workers)


def _local_copy(spec: str) -> tuple[str, str]:
    settings = parse_spec(spec)
    if settings.path is None:
        raise InputError(f"--data {spec} names no folder; write NAME:FOLDER, as in cifar10:data/cifar10")
    return settings.name, settings.path


def _weights(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals:
        raise InputError(f"--weights {text} names no file; write NAME=FILE, as in {PUBLISHED[0]}=weights.pt")
    if name not in PUBLISHED:
        raise unknown("network in --weights:", name, PUBLISHED)
    if not Path(file).is_file():
        raise InputError(f"--weights {text}: there is no file {file}")
    return name, str(Path(file).absolute())
