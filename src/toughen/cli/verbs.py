"""The verbs of the command line. Each calls the package and prints what came out."""

import argparse
import inspect
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml
from rich.markup import escape
from rich.table import Table
from torch import nn

from toughen import data, models, processes
from toughen.attacks import PGD
from toughen.cli.console import err, first_alone_speaks, note, out, say
from toughen.cli.evaluating import run_evaluate, run_transfer
from toughen.cli.exporting import run_export
from toughen.cli.files import check_output, write, write_plot
from toughen.cli.reporting import run_compare, run_report
from toughen.cli.reproducing import run_reproduce
from toughen.cli.sweeping import run_sweep
from toughen.cli.target import check_samples, find_target
from toughen.config import ATTACKS, load_recipe, packages_named, recipe_names, recipe_of
from toughen.criticality import CriticalityOptions, CriticalityReport, analyze
from toughen.criticality.selection import SELECTORS
from toughen.data import AUGMENTS, DATASETS, DataSplits
from toughen.engine import Interrupted, Recipe, Trainer, check_methods, create_model
from toughen.errors import InputError
from toughen.evaluation import attack_names
from toughen.layers import map_layers
from toughen.objectives import METHODS, Objective
from toughen.report import compare_runs, comparison_tables, plot_criticality, plot_report, plot_training
from toughen.run_folder import RunFolder


def _train(options: argparse.Namespace) -> None:
    with processes.joined(), first_alone_speaks():
        _go_on_after_restart(options)
        _train_here(options)


def _go_on_after_restart(options: argparse.Namespace) -> None:
    """Where ``torchrun`` starts the same command once more after a failure, let it resume what it began."""
    if options.resume or options.dry_run or not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return
    if not options.out:
        raise InputError("torchrun --max-restarts needs --out DIR: a restart has to find the run that it goes on with")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if restarted and processes.by_first(RunFolder(Path(options.out)).config_file.is_file):
        options.allow_code = [*options.allow_code, *packages_named(options.words)]  # typed when the run began
        options.resume, options.out, options.words = options.out, None, []


def _train_here(options: argparse.Namespace) -> None:
    words: list[str] = options.words
    if options.resume:
        if words or options.out:
            raise InputError(
                "--resume takes everything from the run folder: give no recipe, override or --out with it;"
                f" to go on with another setting, change it in {Path(options.resume) / 'config.yaml'}"
            )
        run = RunFolder.open(Path(options.resume))
        if run.finished:
            raise InputError(f"run {options.resume} is finished; see it with `toughen compare {options.resume}`")
        recipe = recipe_of(run, allow_code=options.allow_code)
    else:
        named = words[:1] if words and "=" not in words[0] else []
        recipe = load_recipe(named[0] if named else "digits", words[len(named) :], allow_code=options.allow_code)
    if options.dry_run:
        splits = data.load(recipe.data)
        model = create_model(recipe.model, splits)
        check_methods(recipe, model, splits)
        for line in splits.notes:
            note(line)
        print(yaml.safe_dump(recipe.document(), sort_keys=False))
        _print_layers(model, splits)
        return
    trainer = Trainer(recipe, out=options.resume or options.out, resume=bool(options.resume))
    begun = f", going on after {_place(trainer)}" if options.resume else ""
    say(f"run folder: {trainer.folder.path}{begun}")
    for line in (*trainer.data.notes, *_kept_branches(recipe, words)):
        note(line)
    try:
        run = trainer.fit()
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"Continue with: toughen train --resume {shlex.quote(str(trainer.folder.path))}") from None
    if processes.rank() == 0:
        _show(run)


def _place(trainer: Trainer) -> str:
    """Say where a run is, as its epoch lines count."""
    now = trainer.progress
    return f"{now.epoch} epochs" + (f" and {now.step} steps" if now.step else "")


def _kept_branches(recipe: Recipe, words: list[str]) -> list[str]:
    """Say which branches keep methods of their own although the run's are other ones than its recipe says."""
    kept = [name for name, branch in recipe.branches.items() if branch.method != recipe.method]
    if not kept or not any(word.startswith("method=") for word in words):
        return []
    return [f"branches keep methods of their own: {', '.join(kept)}; give them too, or branches=null branch_epoch=null"]


def _show(run: RunFolder) -> None:
    """Print the tables of a finished run, and save its plots into its folder."""
    for member in (run, *run.branches()):
        for epoch, content in list(member.reports().items())[-1:]:
            title = f"{escape(member.path.name)}: selection after {epoch} epochs (* selected)"
            out.print(CriticalityReport.from_dict(content).table(title=title, selected=content["selected"]))
        if member.reports():
            plot_criticality(member, member.path / "criticality.png")
    plot_training(run, run.path / "training.png")
    out.print(comparison_tables(compare_runs([run])))
    plots = ", ".join(sorted(str(file) for file in run.path.rglob("*.png")))
    err.print(f"plots: {plots}", highlight=False, markup=False, soft_wrap=True)
    page = shlex.join(["toughen", "report", str(run.path)])
    err.print(f"a page about it: {page}", highlight=False, markup=False, soft_wrap=True)


def _analyze(options: argparse.Namespace) -> None:
    check_output(options.json)
    check_output(options.plot, ".png", ".pdf", ".svg")
    target = find_target(options)
    criticality = CriticalityOptions(
        norm=options.weakness_norm,
        predecessor=options.predecessor,
        first=options.first,
        measure=options.measure,
        tapped=options.tapped,
        granularity=options.granularity,
        exclude=tuple(options.exclude),
    )
    check_samples(options.samples, len(target.splits.train), "training")
    images = data.probe(
        target.splits.train, count=options.samples, seed=target.seed, position=0, device="cpu", batch_size=50
    )
    attack = PGD(target.threat, step_size=target.step_size, steps=options.steps)
    report = analyze(target.model, images, attack, options=criticality, seed=target.seed)
    target.say_remark()
    out.print(report.table(title=escape(f"criticality of {options.target}, {target.splits.name}")))
    for line in report.notes:
        print(f"note: {line}")
    if options.json:
        write(options.json, report.to_json())
    if options.plot:
        write_plot(options.plot, lambda file: plot_report(report.to_dict(), file))


def _list(options: argparse.Namespace) -> None:
    if options.what == "layers":
        if options.target is None:
            raise InputError("list layers needs a model: toughen list layers MODEL, for example resnet18")
        target = find_target(options)
        _print_layers(target.model, target.splits)
    elif options.what == "recipes":
        for name, description in recipe_names().items():
            print(f"{name:<30} {description}")
    elif options.what == "methods":
        for name, method in METHODS.items():
            kind = "objective" if isinstance(method, type) and issubclass(method, Objective) else "on top"
            formula = (inspect.getdoc(method) or "").splitlines()[0].replace("``", "")
            print(f"{name:<20} {kind:<10} {formula}")
    else:
        names: dict[str, Iterable[str]] = {
            "models": models.model_names(options.target),
            "datasets": DATASETS,
            "attacks": (*ATTACKS, *attack_names()),
            "augmentations": AUGMENTS,
            "selectors": SELECTORS,
        }
        print("\n".join(names[options.what]))


def _print_layers(model: nn.Module, splits: DataSplits) -> None:
    example = next(iter(data.in_order(splits.train, batch_size=1, device=next(model.parameters()).device))).x
    layers = map_layers(model, example)
    table = Table(title=f"layers of {type(model).__name__} on {escape(splits.name)}, in order of execution")
    for title in ("layer", "name", "parameters", "features", "calls"):
        table.add_column(title, justify="left" if title == "name" else "right")
    for layer in layers:
        index = "classifier" if layer.classifier else str(layer.index)
        table.add_row(
            index, escape(layer.name), str(layer.num_parameters), str(layer.num_features), str(layer.num_calls)
        )
    out.print(table)
    for line in layers.notes():
        print(f"note: {line}")


VERBS = {
    "train": _train,
    "analyze": _analyze,
    "evaluate": run_evaluate,
    "transfer": run_transfer,
    "compare": run_compare,
    "report": run_report,
    "export": run_export,
    "sweep": run_sweep,
    "reproduce": run_reproduce,
    "list": _list,
}
