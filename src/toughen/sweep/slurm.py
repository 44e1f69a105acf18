"""The runs of a sweep as a SLURM array: one script, of which each task trains one run."""

import math
import shlex
import sys
from pathlib import Path

from toughen.run_folder import RunFolder
from toughen.sweep.grid import Sweep
from toughen.sweep.store import OUTPUT, RECIPE, SweepFolder

_WARNING = 300  # seconds between the signal and the end of the time limit, for the checkpoint


def slurm_script(sweep: Sweep, folder: SweepFolder, *, workers: int | None) -> str:
    """Return a script for ``sbatch``; submitted once more, it goes on where its tasks have stopped.

    Args:
        sweep: Its runs are the tasks, in order.
        folder: Where these are laid out already.
        workers: Tasks at a time at most.
    """
    here = Path.cwd()
    names = "\n".join(f"  {shlex.quote(run.name)}" for run in sweep.runs)
    limit = f"%{workers}" if workers else ""
    gpus = math.ceil(sweep.resources.gpus)
    directives = [
        f"--job-name={sweep.name}",
        f"--array=0-{len(sweep.runs) - 1}{limit}",
        f"--cpus-per-task={sweep.resources.threads}",
        *([f"--gpus-per-task={gpus}", "--ntasks=1"] if gpus else []),
        f"--signal=B:TERM@{_WARNING}",
        "--requeue",
    ]
    run = RunFolder(Path("$run"))  # as the shell knows it
    toughen = f"exec {shlex.quote(sys.executable)} -P -m toughen train"
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "set -euo pipefail",
            f"cd {shlex.quote(str(here))}",
            *(f"export {name}={shlex.quote(value)}" for name, value in sweep.environment.items()),
            f"folder={shlex.quote(str(folder.path))}",
            "runs=(",
            names,
            ")",
            "run=$folder/${runs[$SLURM_ARRAY_TASK_ID]}",
            f'if [ -e "{run.finished_file}" ]; then exit 0; fi',
            f'exec >>"$run/{OUTPUT}" 2>&1 </dev/null',
            "# exec: SLURM's warning reaches the run itself, which then writes its checkpoint",
            f'if [ -e "{run.config_file}" ]; then {toughen} --resume "$run"; fi',
            f'{toughen} "$run/{RECIPE}" --out "$run"',
        ]
    )
