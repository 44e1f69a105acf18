"""The verb ``sweep``, and what ``compare`` makes of a sweep's folder."""

import argparse
import shlex
from pathlib import Path

import torch

from toughen.cli.console import note, out, say
from toughen.cli.files import check_output, write
from toughen.errors import InputError
from toughen.report import compare_runs, comparison_tables
from toughen.run_folder import RunFolder
from toughen.sweep import Address, Sweep, SweepFolder, finished_runs, plan_table, read_sweep, slurm_script, train_all


def run_sweep(options: argparse.Namespace) -> None:
    """Train the runs of a FILE, or print or write out what would be trained."""
    if options.slurm and (options.address or options.dry_run):
        raise InputError("--slurm writes a script and trains nothing: give no --address and no --dry-run with it")
    address = Address(options.address, options.workers)
    check_output(options.slurm)
    sweep = read_sweep(options.file, allow_code=options.allow_code)
    check_devices(sweep, "resources.gpus")
    folder = SweepFolder(Path(options.out or Path("runs") / sweep.name))
    if options.dry_run:
        out.print(plan_table(sweep))
        return
    if options.slurm:
        with folder.held():
            folder.lay_out(sweep)
        write(options.slurm, slurm_script(sweep, folder, workers=options.workers))
        say(f"{len(sweep.runs)} runs in {folder.path}; submit them with: sbatch {shlex.quote(options.slurm)}")
        return
    say(f"sweep folder: {folder.path}")
    runs = train_all(sweep, folder, address)
    failed = [one for one in runs if one.state == "failed"]
    if len(failed) < len(runs):
        _show(folder)
    if failed:
        first = failed[0]
        others = f"; {', '.join(one.run.name for one in failed[1:])} too" if failed[1:] else ""
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed: {first.run.name}: {first.message}{others}. See output.log in"
            " their folders; the same command tries them again"
        )


def expanded(runs: list[str]) -> list[RunFolder]:
    """Open run folders; the folder of a sweep stands for its finished runs.

    Raises:
        InputError: One is neither.
    """
    folders = []
    for run in runs:
        found = finished_runs(Path(run))
        if found is None:
            folders.append(RunFolder.open(Path(run)))
            continue
        finished, others = found
        folders += finished
        if others:
            note(f"sweep {run}: not finished, and left out: {', '.join(others)}")
    return folders


def _show(folder: SweepFolder) -> None:
    """Print the comparison of the finished runs, where they can be compared."""
    try:
        out.print(comparison_tables(compare_runs(expanded([str(folder.path)]))))
    except InputError as error:
        note(f"no comparison: {error}")


def check_devices(sweep: Sweep, setting: str) -> None:
    """Refuse runs for a GPU of which they would see none, and say so where they could have one.

    Args:
        sweep: The runs.
        setting: What the user would change, for messages.

    Raises:
        InputError: A run is for CUDA alone.
    """
    if sweep.resources.gpus:
        return
    for run in sweep.runs:
        if run.recipe.train.device == "cuda":
            raise InputError(
                f"sweep {sweep.file}, run {run.name}: train.device is cuda, but {setting} is 0; set it to 1, or to"
                " a share of a GPU"
            )
    if torch.cuda.is_available() and any(run.recipe.train.device == "auto" for run in sweep.runs):
        note(f"{setting} is 0, so the runs see no GPU; set it to 1, or to a share of one")
