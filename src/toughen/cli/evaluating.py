"""The verbs that attack: ``evaluate`` one model, ``transfer`` between several."""

import argparse
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from torch import nn

from toughen import data, processes
from toughen.cli.console import first_alone_speaks, note, out
from toughen.cli.files import check_folder, check_output, write, write_plot
from toughen.cli.target import Target, check_samples, find_target
from toughen.data import Images
from toughen.engine import Interrupted
from toughen.engine.progress import attack_progress
from toughen.errors import InputError, one_line
from toughen.evaluation import (
    EvalAttack,
    EvalResult,
    Flag,
    Journal,
    TransferMatrix,
    evaluate,
    facts_of,
    parse_attack,
    transfer,
)
from toughen.report import plot_strength, plot_transfer
from toughen.statistics import wilson_interval

# what a run's own results were measured with; with another value, a result is not one of the run's
_OF_THE_RUN = ("data", "samples", "eps", "norm", "step_size", "seed", "batch_size", "accurate")


def run_evaluate(options: argparse.Namespace) -> None:
    """Measure clean and attacked accuracy of a TARGET, in all processes that were started."""
    with processes.joined(), processes.sigterm_interrupts(), first_alone_speaks():
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    _check_outputs(options)
    if options.repeats < 1:
        raise InputError(f"--repeats is {options.repeats}; it must be at least 1")
    if options.plot:
        _check_curve(options.over)
    target = find_target(options)
    names = _over(options.attacks.split(","), options.over)
    attacks = [parse_attack(name, threat=target.threat, step_size=target.step_size) for name in names]
    images = _images(options, target)
    results = _measured(options, target, attacks, images)
    target.say_remark()
    mixed = "" if options.accurate is None else f" mixed with {options.accurate} (alpha {options.alpha:g})"
    _say_seen(f"{options.target}{mixed}", target, len(images), results[0])
    out.print(_table(results))
    if options.per_class:
        out.print(_class_table(results[0], target.splits.train.classes))
    checked = any(hasattr(search, "threat") for attack in attacks for _, search in attack.stages)
    _say_flags(next(iter(results[0].values())).flags, checked=checked)
    for remark in dict.fromkeys(remark for found in results for one in found.values() for remark in one.remarks):
        note(remark)
    if otherwise := _otherwise(options, target):
        keep = "to go on after a stop" if options.json else "to keep results and to go on after a stop"
        note(f"not kept in the run: {otherwise}; give --out DIR {keep}")
    if options.json and processes.rank() == 0:
        dumped = [{name: result.to_dict() for name, result in found.items()} for found in results]
        write(options.json, json.dumps(dumped[0] if options.repeats == 1 else {"repeats": dumped}))
    if options.plot and processes.rank() == 0:
        points = {name: (result.accuracy, result.n) for name, result in results[0].items()}
        write_plot(options.plot, lambda file: plot_strength(points, options.over.partition("=")[0], file))


def _check_outputs(options: argparse.Namespace) -> None:
    if processes.rank() == 0:  # the others write nothing, and may be on machines without these folders
        check_output(options.json)
        check_output(options.plot, ".png", ".pdf", ".svg")


def _check_curve(over: str | None) -> None:
    """Refuse to draw a strength curve over nothing, or over what are no numbers."""
    if over is None:
        raise InputError("--plot draws a strength curve; say over what with --over, as in --over eps=2/255,4/255,8/255")
    for value in over.partition("=")[2].split(","):
        try:
            float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise InputError(
                f"--plot draws accuracy over numbers, and --over has {value!r}; leave --plot out"
            ) from None


def _over(names: Sequence[str], over: str | None) -> list[str]:
    """Each attack once for each value of ``KEY=VALUE,VALUE,...``; clean images once."""
    if over is None:
        return list(names)
    key, equals, values = over.partition("=")
    if not (key and equals and values):
        raise InputError(f"--over is {over!r}; write KEY=VALUE,VALUE,... as in eps=2/255,4/255,8/255 or steps=1,5,20")
    varied = [name for name in names if name != "clean"]
    if not varied:
        raise InputError("--over varies attacks, and --attacks names none but clean")
    return [name for name in names if name == "clean"] + [
        f"{name}:{key}={value}" for name in varied for value in values.split(",")
    ]


def _images(options: argparse.Namespace, target: Target) -> Images:
    images = target.splits.test
    samples = options.samples
    if samples is None and target.run is not None and options.data is None and options.accurate is None:
        samples = target.run.config()["evaluate"]["samples"]
    if samples is None:
        return images
    check_samples(samples, len(images), "test")
    return images.subset(slice(samples))


def _measured(
    options: argparse.Namespace, target: Target, attacks: Sequence[EvalAttack], images: Images
) -> list[dict[str, EvalResult]]:
    """The results of each repetition, with seeds that follow one another."""
    batch_size = target.batch_size if options.batch_size is None else options.batch_size
    batches = data.in_order(images, batch_size=batch_size, device="cpu")
    folder, facts = _journal(options, target, images)
    found, reused = [], []
    try:
        with attack_progress() as progress:
            for seed in range(target.seed, target.seed + options.repeats):
                place = folder if folder is None or seed == target.seed else folder / f"seed-{seed}"
                journal = None if place is None else Journal(place, facts, again=options.again)
                found.append(
                    evaluate(
                        target.model,
                        batches,
                        attacks,
                        seed=seed,
                        batch_size=batch_size,
                        journal=journal,
                        progress=progress,
                    )
                )
                reused += [] if journal is None else journal.reused
    except KeyboardInterrupt:
        raise Interrupted(_left_by_a_stop(options, target, folder)) from None
    if reused:
        note(f"{', '.join(dict.fromkeys(reused))}: as measured before, in {folder}; --again repeats it")
    return found


def _left_by_a_stop(options: argparse.Namespace, target: Target, folder: Path | None) -> str:
    if folder is not None:
        return f"What was measured is kept in {folder}; the same command goes on from there."
    otherwise = _otherwise(options, target)
    return f"Nothing is kept{f': {otherwise}' if otherwise else ''}; with --out DIR the same command would go on."


def _otherwise(options: argparse.Namespace, target: Target) -> str:
    """Say what keeps results out of the run folder that they were measured on; nothing where they are kept."""
    changed = [f"--{name.replace('_', '-')}" for name in _OF_THE_RUN if getattr(options, name) is not None]
    if target.run is None or options.out is not None or not changed:
        return ""
    return f"measured otherwise than the run ({', '.join(changed)})"


def _journal(options: argparse.Namespace, target: Target, images: Images) -> tuple[Path | None, dict[str, object]]:
    """Where results are kept: --out, or the run folder unless it is measured otherwise than it was."""
    facts: dict[str, object] = facts_of(target.model, images)
    if options.alpha is not None:
        facts["alpha"] = options.alpha  # a constant weight is no part of the network's state
    if options.out is not None:
        if processes.rank() == 0:
            check_folder(options.out)
        return Path(options.out), facts
    if target.run is None or _otherwise(options, target):
        return None, facts
    checkpoint = options.checkpoint or "last"
    folder = target.run.evals(checkpoint) if options.over is None else target.run.strength(checkpoint)
    return folder, {"checkpoint": checkpoint, "epoch": target.epoch, **facts}


def _say_seen(name: str, target: Target, num_images: int, results: Mapping[str, EvalResult]) -> None:
    num_seen = next(iter(results.values())).n
    if num_seen < num_images:
        note(f"skipped {num_images - num_seen} test images that cannot be decoded")
    threat = f"{target.threat.norm} eps {target.threat.eps:.4g}, step size {target.step_size:.4g}"
    seen = f"{name}, {num_seen} test images of {target.splits.name}, {threat}:"
    out.print(one_line(seen), highlight=False, markup=False)


def _table(results: Sequence[Mapping[str, EvalResult]]) -> Table:
    """Accuracies with their 95 % intervals; over repetitions also mean, spread and the worst case of each sample."""
    repeated = len(results) > 1
    table = Table()
    columns = ("attack", "accuracy", "95 % interval", "passes/image", "seconds")
    for title in (*columns[:2], *(("mean (min to max)", "worst of all") if repeated else ()), *columns[2:]):
        table.add_column(title, justify="left" if title == "attack" else "right")
    for name, result in results[0].items():
        again = [found[name] for found in results]
        worst = [all(right) for right in zip(*(one.correct for one in again), strict=True)]
        interval = wilson_interval(sum(result.correct), result.n)
        values = [100 * one.accuracy for one in again]
        mean = f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        passes = sum(stage.forwards + stage.backwards for stage in result.stages) / result.n
        table.add_row(
            escape(name),
            f"{100 * result.accuracy:.2f} %",
            *((mean, f"{100 * sum(worst) / len(worst):.2f} %") if repeated else ()),
            f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
            f"{passes:.1f}" if result.stages else "",
            f"{result.seconds:.1f}" if result.stages else "",
        )
        stages = result.stages if len(result.stages) > 1 else ()
        standing = sum(1 for place in result.fell if place != "clean")
        for stage in stages:
            standing -= stage.fell
            table.add_row(f"  after {escape(stage.name)}", f"{100 * standing / result.n:.2f} %")
    return table


def _class_table(results: Mapping[str, EvalResult], classes: Sequence[str]) -> Table:
    table = Table(title="accuracy by class, percent")
    table.add_column("class")
    table.add_column("n", justify="right")
    for name in results:
        table.add_column(escape(name), justify="right")
    found = [result.per_class() for result in results.values()]
    for label, (_, count) in found[0].items():
        table.add_row(escape(one_line(classes[label])), str(count), *(f"{100 * one[label][0]:.1f}" for one in found))
    return table


def _say_flags(flags: Sequence[Flag], *, checked: bool) -> None:
    for flag in flags:
        out.print(f"sanity flag: {flag}", highlight=False, markup=False, soft_wrap=True)
    if not flags:
        seen = "nothing seen" if checked else "none made; they take an attack that has an eps, for example pgd-20"
        out.print(f"sanity checks: {seen}", highlight=False)


def run_transfer(options: argparse.Namespace) -> None:
    """Let every TARGET attack every other one, in all processes that were started."""
    with processes.joined(), processes.sigterm_interrupts(), first_alone_speaks():
        _transfer(options)


def _transfer(options: argparse.Namespace) -> None:
    _check_outputs(options)
    if len(set(options.targets)) < len(options.targets):
        raise InputError("a TARGET is named twice; each model attacks all of them anyway")
    found = {name: find_target(argparse.Namespace(**{**vars(options), "target": name})) for name in options.targets}
    first = found[options.targets[0]]
    images = _images(options, first)
    for name, other in found.items():
        _check_alike(options.targets[0], first, name, other)
    models: dict[str, nn.Module] = {_short(name, options.targets): one.model for name, one in found.items()}
    batch_size = first.batch_size if options.batch_size is None else options.batch_size
    batches = data.in_order(images, batch_size=batch_size, device="cpu")
    matrices = []
    with attack_progress() as progress:
        for name in options.attacks.split(","):
            attack = parse_attack(name, threat=first.threat, step_size=first.step_size)
            matrices.append(
                transfer(models, batches, attack, seed=first.seed, batch_size=batch_size, progress=progress)
            )
    for one in found.values():
        one.say_remark()
    for matrix in matrices:
        out.print(_transfer_table(matrix, first))
        _say_flags(matrix.flags, checked=True)
    if options.json and processes.rank() == 0:
        write(options.json, json.dumps({matrix.attack: matrix.to_dict() for matrix in matrices}))
    if options.plot and processes.rank() == 0:
        write_plot(options.plot, lambda file: plot_transfer([matrix.to_dict() for matrix in matrices], file))


def _check_alike(first_name: str, first: Target, name: str, other: Target) -> None:
    if other.splits.test.digest() != first.splits.test.digest():
        raise InputError(f"{name} and {first_name} have different test images; give both the same with --data")
    if other.threat != first.threat:
        raise InputError(f"{name} and {first_name} have different threat models; set one with --norm and --eps")


def _short(name: str, names: Sequence[str]) -> str:
    """The end of a path that tells it from the others."""
    parts = Path(name).parts
    for count in range(1, len(parts) + 1):
        ends = ["/".join(Path(other).parts[-count:]) for other in names]
        if ends.count("/".join(parts[-count:])) == 1:
            return "/".join(parts[-count:])
    return name


def _transfer_table(matrix: TransferMatrix, target: Target) -> Table:
    threat = f"{target.threat.norm} eps {target.threat.eps:.4g}"
    n = len(matrix.clean[0])
    table = Table(title=f"accuracy under {escape(matrix.attack)}, {threat}, n = {n}, percent; * white-box")
    table.add_column("made on \\ shown to", no_wrap=True)
    for name in matrix.names:
        table.add_column(escape(name), justify="right")
    table.add_row("clean images", *(f"{100 * sum(found) / n:.1f}" for found in matrix.clean))
    for i, (name, row) in enumerate(zip(matrix.names, matrix.accuracy, strict=True)):
        table.add_row(escape(name), *(f"{100 * value:.1f}{'*' if i == j else ''}" for j, value in enumerate(row)))
    return table
