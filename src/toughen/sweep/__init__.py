"""Grids of runs: a file of settings and seeds, laid out as run folders, trained on Ray or written out for SLURM."""

from toughen.sweep.grid import Resources, Run, Sweep, read_sweep
from toughen.sweep.schedule import Address, train_all
from toughen.sweep.serial import stopped_after, train_serially
from toughen.sweep.slurm import slurm_script
from toughen.sweep.store import SweepFolder, finished_runs
from toughen.sweep.watch import Watch, plan_table

__all__ = [
    "Address",
    "Resources",
    "Run",
    "Sweep",
    "SweepFolder",
    "Watch",
    "finished_runs",
    "plan_table",
    "read_sweep",
    "slurm_script",
    "stopped_after",
    "train_all",
    "train_serially",
]
