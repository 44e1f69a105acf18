"""The verb that hands a trained network on: ``export``."""

import argparse
from pathlib import Path

from toughen import models
from toughen.cli.console import note, out
from toughen.cli.target import find_target
from toughen.config import recipe_of
from toughen.engine import ModelSettings, checkpoint
from toughen.errors import InputError
from toughen.export import check_hub, export, facts_of_run, push
from toughen.run_folder import RunFolder


def run_export(options: argparse.Namespace) -> None:
    """Write a network of a run into a folder for others, and push it to the hub if that is wanted."""
    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    elif options.private:
        raise InputError("--private is about the repository of --push-to-hub OWNER/NAME; give both, or neither")
    given = Path(options.target)
    if not given.is_dir() or models.is_exported(given):
        raise InputError(f"{given} is no run folder, and export takes one: it tells how the network was made")
    target = find_target(options)
    assert target.run is not None
    settings = recipe_of(RunFolder.open(given), allow_code=options.allow_code).model
    if not isinstance(settings, ModelSettings):
        raise InputError(f"{given} trained a mixture of two networks, which has no exported form; export the two runs")
    name = options.checkpoint or "last"
    facts = facts_of_run(
        target.run,
        settings,
        target.model,
        target.splits,
        threat=target.threat,
        step_size=target.step_size,
        checkpoint=name,
        epoch=target.epoch,
        name=options.name,
        license=options.license,
    )
    folder, weights = Path(options.to), checkpoint.whole_weights(target.run.checkpoints / name)
    notes = export(target.model, facts, weights, folder, formats=options.format.split(","))
    target.say_remark()
    for line in notes:
        note(line)
    out.print(f"exported {options.target}, checkpoint {name}, to {folder}", highlight=False, markup=False)
    if options.push_to_hub is not None:
        address = push(folder, options.push_to_hub, private=options.private)
        out.print(f"pushed to {address}", highlight=False, markup=False)
