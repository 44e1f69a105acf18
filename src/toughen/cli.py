"""The command line: ``toughen VERB``. Parses, calls the package, prints; results to stdout, progress to stderr."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from toughen import __version__, data
from toughen.attacks import PGD
from toughen.config import ATTACKS, load_recipe, recipe_names, resolve
from toughen.criticality import CriticalityOptions, CriticalityReport, analyze
from toughen.criticality.selection import SELECTORS
from toughen.data import DATASETS, DataSplits
from toughen.engine import (
    Interrupted,
    ModelSettings,
    Recipe,
    Trainer,
    check_methods,
    checkpoint,
    create_model,
    pick_device,
)
from toughen.engine.progress import sample_progress
from toughen.errors import InputError
from toughen.evaluation import attack_names, evaluate, parse_attack, store
from toughen.layers import map_layers
from toughen.models import MODELS
from toughen.objectives import METHODS
from toughen.report import comparison_table, plot_criticality, plot_report, plot_training
from toughen.run_folder import RunFolder, write_text
from toughen.types import ThreatModel

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 done; 2 the user's mistake, told in one line; 130 stopped by Ctrl-C, with the checkpoint written.
    """
    try:
        options, rest = _parser().parse_known_args(arguments)
        if rest and (options.run is not _train or any(word.startswith("-") for word in rest)):
            raise InputError(f"unrecognized arguments: {' '.join(rest)} (see `toughen --help`)")
        if rest:  # recipe and overrides may stand on both sides of an option
            options.words += rest
        options.run(options)
    except InputError as error:
        print(f"toughen: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a vanished mount
        print(f"toughen: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        print(f"toughen: stopped. {stopped}".rstrip(), file=sys.stderr)
        return 130
    return 0


# -- the verbs ----------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> None:
    words: list[str] = options.words
    if options.resume:
        if words or options.out:
            raise InputError("--resume takes everything from the run folder: give no recipe, override or --out with it")
        run = RunFolder.open(Path(options.resume))
        if run.finished:
            raise InputError(f"run {options.resume} is finished; see it with `toughen compare {options.resume}`")
        recipe = resolve(run.config())
    else:
        named = words[:1] if words and "=" not in words[0] else []
        recipe = load_recipe(named[0] if named else "digits", words[len(named) :])
    if options.dry_run:
        splits = data.load(recipe.data)
        model = create_model(recipe.model, splits)
        check_methods(recipe, model, splits)
        for member in (recipe, *recipe.branches.values()):
            data.DeviceLoader(splits.train, batch_size=member.train.batch_size, device="cpu", seed=0)
        print(yaml.safe_dump(recipe.document(), sort_keys=False))
        _print_layers(model, splits)
        return
    trainer = Trainer(recipe, out=options.resume or options.out, resume=bool(options.resume))
    err.print(f"run folder: {trainer.folder.path}", highlight=False, soft_wrap=True)
    try:
        run = trainer.fit()
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"Continue with: toughen train --resume {trainer.folder.path}") from None
    _show(run)


def _show(run: RunFolder) -> None:
    """Print the tables of a finished run, and save its plots into its folder."""
    for member in (run, *run.branches()):
        for epoch, content in list(member.reports().items())[-1:]:
            title = f"{member.path.name}: selection after {epoch} epochs (* selected)"
            out.print(CriticalityReport.from_dict(content).table(title=title, selected=content["selected"]))
        if member.reports():
            plot_criticality(member, member.path / "criticality.png")
    plot_training(run, run.path / "training.png")
    out.print(comparison_table([run]))
    plots = ", ".join(sorted(str(file) for file in run.path.rglob("*.png")))
    err.print(f"plots: {plots}", highlight=False, soft_wrap=True)


def _analyze(options: argparse.Namespace) -> None:
    _check_output(options.json)
    _check_output(options.plot, ".png", ".pdf", ".svg")
    target = _target(options)
    criticality = CriticalityOptions(
        norm=options.weakness_norm,
        predecessor=options.predecessor,
        first=options.first,
        measure=options.measure,
        tapped=options.tapped,
        granularity=options.granularity,
        exclude=tuple(options.exclude),
    )
    _check_samples(options.samples, len(target.splits.train), "training")
    images = data.probe(
        target.splits.train, count=options.samples, seed=target.seed, position=0, device="cpu", batch_size=50
    )
    attack = PGD(target.threat, step_size=target.step_size, steps=options.steps)
    report = analyze(target.model, images, attack, options=criticality, seed=target.seed)
    target.say_note()
    out.print(report.table(title=f"criticality of {options.target}, {target.splits.name}"))
    for note in report.notes:
        print(f"note: {note}")
    if options.json:
        _write(options.json, report.to_json())
    if options.plot:
        try:
            plot_report(report.to_dict(), Path(options.plot))
        except (OSError, ValueError) as error:
            raise InputError(f"can't write plot {options.plot}: {error}") from None


def _evaluate(options: argparse.Namespace) -> None:
    _check_output(options.json)
    target = _target(options)
    names = options.attacks.split(",")
    attacks = [parse_attack(name, threat=target.threat, step_size=target.step_size) for name in names]
    images = target.splits.test
    samples = options.samples
    if samples is None and target.run is not None and options.data is None:
        samples = target.run.config()["evaluate"]["samples"]
    if samples is not None:
        _check_samples(samples, len(images), "test")
        images = images.subset(slice(samples))
    batch_size = target.batch_size if options.batch_size is None else options.batch_size
    with sample_progress(len(images)) as progress:
        batches = data.in_order(images, batch_size=batch_size, device="cpu")
        results = evaluate(target.model, batches, attacks, seed=target.seed, progress=progress)
    changed = ("data", "samples", "eps", "norm", "step_size", "seed", "batch_size")
    if target.run is not None and all(getattr(options, name) is None for name in changed):
        # measured otherwise, it must not replace the run's own results
        store(target.run, results, checkpoint=options.checkpoint or "last", epoch=target.epoch, images=images)
    target.say_note()
    threat = f"{target.threat.norm} eps {target.threat.eps:.4g}, step size {target.step_size:.4g}"
    out.print(f"{options.target}, {len(images)} test images of {target.splits.name}, {threat}:", highlight=False)
    table = Table("attack", "accuracy")
    for result in results.values():
        table.add_row(result.attack, f"{100 * result.accuracy:.2f} %")
    out.print(table)
    if options.json:
        _write(options.json, json.dumps({name: result.to_dict() for name, result in results.items()}))


def _compare(options: argparse.Namespace) -> None:
    out.print(comparison_table([RunFolder.open(Path(run)) for run in options.runs]))


def _list(options: argparse.Namespace) -> None:
    if options.what == "layers":
        if options.target is None:
            raise InputError("list layers needs a model: toughen list layers MODEL, for example resnet18")
        target = _target(options)
        _print_layers(target.model, target.splits)
    elif options.what == "recipes":
        for name, description in recipe_names().items():
            print(f"{name:<28} {description}")
    else:
        names: dict[str, Iterable[str]] = {
            "models": MODELS,
            "datasets": DATASETS,
            "methods": METHODS,
            "attacks": (*ATTACKS, *attack_names()),
            "selectors": SELECTORS,
        }
        print("\n".join(names[options.what]))


# -- what a verb works on -----------------------------------------------------------------------------


class _Target(NamedTuple):
    """A model with the images and the threat model that belong to it."""

    model: nn.Module
    splits: DataSplits
    threat: ThreatModel
    step_size: float
    seed: int
    batch_size: int = 250
    run: RunFolder | None = None
    epoch: int = 0
    note: str = ""

    def say_note(self) -> None:
        """Tell what the reader of the results must know; beside an error it would be a second line."""
        if self.note:
            err.print(f"note: {self.note}", highlight=False, soft_wrap=True)


def _target(options: argparse.Namespace) -> _Target:
    """Resolve TARGET: a run folder, a weights file with --model, or a model by name (with random weights)."""
    given = Path(options.target)
    if given.is_dir() and options.target not in MODELS:
        run = RunFolder.open(given)
        for flag in ("model", "width"):
            if getattr(options, flag, None) is not None:
                raise InputError(f"{given} is a run folder, which knows its model; leave --{flag} out")
        if options.image_size is not None and options.data is None:
            raise InputError("--image-size is for the images of --data; the run's own images keep their size")
        recipe = resolve(run.config())
        splits = _splits(options, recipe)
        model = create_model(recipe.model, splits)
        state = checkpoint.load(run.checkpoints / (options.checkpoint or "last"), model)
        threat, step_size = _threat(options, recipe)
        seed = recipe.train.seed if options.seed is None else options.seed
        batch_size = recipe.test_batch_size
        model.to(pick_device(options.device))
        return _Target(model, splits, threat, step_size, seed, batch_size, run, state["epoch"])
    if options.checkpoint is not None:
        raise InputError(f"--checkpoint chooses between the checkpoints of a run folder, and {given} is none")
    splits = _splits(options, None)
    threat, step_size = _threat(options, None)
    note = ""
    if given.is_file():
        if options.model is None:
            raise InputError(
                f"{given} is a file of weights; say of which model with --model, for example --model resnet18"
            )
        model = create_model(ModelSettings(name=options.model, width=options.width), splits)
        checkpoint.load_weights(given, model)
    else:
        if options.model is not None:
            raise InputError(f"--model is for a weights file, and there is no file {given}")
        if options.target not in MODELS and (given.suffix or len(given.parts) > 1):
            raise InputError(f"{given} is neither a run folder, nor a weights file, nor a model: {', '.join(MODELS)}")
        model = create_model(ModelSettings(name=options.target, width=options.width), splits)
        note = f"{options.target} has random weights; give a run folder or a weights file for a trained one"
    model.to(pick_device(options.device))
    return _Target(model, splits, threat, step_size, options.seed or 0, note=note)


def _splits(options: argparse.Namespace, recipe: Recipe | None) -> DataSplits:
    if options.data is None and recipe is not None:
        return data.load(recipe.data)
    # nothing is trained here, so one image is enough of a validation set
    return data.load(replace(data.parse_spec(options.data or "digits"), validation=1, image_size=options.image_size))


def _threat(options: argparse.Namespace, recipe: Recipe | None) -> tuple[ThreatModel, float]:
    eps = options.eps if options.eps is not None else (recipe.threat.eps if recipe else 8 / 255)
    norm = options.norm or (recipe.threat.norm if recipe else "linf")
    if options.step_size is not None:
        return ThreatModel(norm=norm, eps=eps), options.step_size
    return ThreatModel(norm=norm, eps=eps), recipe.test_step_size if recipe and options.eps is None else eps / 4


def _check_samples(samples: int, available: int, what: str) -> None:
    if not 1 <= samples <= available:
        raise InputError(f"--samples is {samples}; with {available} {what} images it must be 1 to {available}")


def _print_layers(model: nn.Module, splits: DataSplits) -> None:
    example = next(data.in_order(splits.train, batch_size=1, device=next(model.parameters()).device)).x
    layers = map_layers(model, example)
    table = Table(title=f"layers of {type(model).__name__} on {splits.name}, in order of execution")
    for title in ("layer", "name", "parameters", "features", "calls"):
        table.add_column(title, justify="left" if title == "name" else "right")
    for layer in layers:
        index = "classifier" if layer.classifier else str(layer.index)
        table.add_row(index, layer.name, str(layer.num_parameters), str(layer.num_features), str(layer.num_calls))
    out.print(table)
    for note in layers.notes():
        print(f"note: {note}")


def _check_output(file: str | None, *suffixes: str) -> None:
    """Refuse a file that could not be written, before the work that would fill it."""
    if file is None:
        return
    path = Path(file)
    if not path.parent.is_dir():
        raise InputError(f"can't write {file}: there is no folder {path.parent}")
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"can't write {file}: its name must end in {', '.join(suffixes)}")


def _write(file: str, text: str) -> None:
    try:
        write_text(Path(file), text + "\n")
    except OSError as error:
        raise InputError(f"can't write {file}: {error.strerror}") from None


# -- the grammar --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def _number(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a fraction such as 8/255") from None


def _parser() -> _Parser:
    parser = _Parser(prog="toughen", description="Make image classifiers robust to adversarial examples.")
    parser.add_argument("--version", action="version", version=f"toughen {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: object, text: str, example: str) -> _Parser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    train = verb(
        "train",
        _train,
        "Train a recipe; then print and plot what came out.",
        "toughen train digits train.epochs=4 branch_epoch=2",
    )
    train.add_argument(
        "words", nargs="*", metavar="[RECIPE] key.path=value", help="recipe (default: digits) and overrides"
    )
    train.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    train.add_argument("--out", metavar="DIR", help="the run folder to make (default: a new one under runs/)")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the layer map, train nothing"
    )

    analyze = verb(
        "analyze", _analyze, "Measure the criticality of each layer.", "toughen analyze small_cnn --data digits"
    )
    _add_target(analyze)
    analyze.add_argument(
        "--samples", type=int, default=100, help="training images to measure on (default: %(default)s)"
    )
    analyze.add_argument("--steps", type=int, default=10, help="PGD steps (default: %(default)s)")
    analyze.add_argument("--json", metavar="FILE", help="write the report")
    analyze.add_argument("--plot", metavar="FILE", help="draw the report (.png, .pdf, .svg)")
    for flag, choices in {
        "--weakness-norm": ("dim", "rms", "none", "relative"),
        "--predecessor": ("execution", "graph"),
        "--first": ("literal", "input_ratio"),
        "--measure": ("index", "curvature"),
        "--tapped": ("output", "norm"),
        "--granularity": ("weights", "leaves", "blocks"),
    }.items():
        analyze.add_argument(
            flag, choices=choices, default=choices[0], help="see CriticalityOptions (default: %(default)s)"
        )
    analyze.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layer names to leave out")

    evaluate_ = verb(
        "evaluate",
        _evaluate,
        "Measure clean and attacked accuracy on test images.",
        "toughen evaluate small_cnn --attacks clean,pgd-20",
    )
    _add_target(evaluate_)
    evaluate_.add_argument("--attacks", default="clean,pgd-20", metavar="NAME,NAME", help="default: %(default)s")
    evaluate_.add_argument("--samples", type=int, metavar="N", help="first N test images (default: all)")
    evaluate_.add_argument("--batch-size", type=int, help="(default: the run's, or 250)")
    evaluate_.add_argument("--json", metavar="FILE", help="write the outcome of every sample")

    compare = verb("compare", _compare, "Put runs side by side.", "toughen compare runs/small_cnn-digits")
    compare.add_argument("runs", nargs="+", metavar="RUN")

    list_ = verb("list", _list, "List what there is by name.", "toughen list layers resnet18")
    list_.add_argument("what", choices=("models", "datasets", "methods", "attacks", "selectors", "recipes", "layers"))
    list_.add_argument("target", nargs="?", metavar="MODEL", help="for layers: as in analyze")
    _add_target_options(list_)
    return parser


def _add_target(parser: _Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help="a run folder, a weights file with --model, or a model name")
    _add_target_options(parser)


def _add_target_options(parser: _Parser) -> None:
    parser.add_argument("--model", metavar="NAME", help="the model of a weights file")
    parser.add_argument("--width", type=int, help="channels of the model's first stage")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run (default: last)")
    parser.add_argument(
        "--data", metavar="SPEC", help="digits, cifar10, folder:PATH, parquet:PATH (default: the run's, or digits)"
    )
    parser.add_argument("--image-size", type=int, help="resize the images of --data")
    parser.add_argument("--norm", choices=("linf", "l2"), help="of the threat model (default: the run's, or linf)")
    parser.add_argument("--eps", type=_number, help="its radius in [0, 1] pixel units (default: the run's, or 8/255)")
    parser.add_argument("--step-size", type=_number, help="of PGD (default: the run's, or eps/4)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of random starts (default: the run's, or 0)")
