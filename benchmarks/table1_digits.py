"""Run the recipes of table1_digits with several seeds and write their table. Goes on where it was stopped.

python benchmarks/table1_digits.py runs/table1 --seeds 0 1 2 --jobs 2 --json results/table1_digits.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from collect import member

from toughen.config import recipe_names
from toughen.run_folder import RunFolder

SHELF = "table1_digits/"
# as the paper's tables have them, then the others
ORDER = ("pgd-at", "trades", "mart", "awp", "score", "autolora", "fast-at", "swa", "twins", "clean")


def run(name: str, seed: int, folder: Path) -> None:
    """Train one recipe with one seed on one thread, or what is left of it."""
    place = folder / f"{name}-{seed}"
    if (place / "config.yaml").is_file():
        if RunFolder.open(place).finished:
            return
        words = ["--resume", str(place)]
    else:
        words = [SHELF + name, f"train.seed={seed}", "--out", str(place)]
    started = time.perf_counter()
    subprocess.run(  # noqa: S603 - this very package, on recipes of its own
        [sys.executable, "-m", "toughen", "train", *words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    (place / "wall_seconds").write_text(f"{time.perf_counter() - started:.1f}")


def gather(names: Sequence[str], seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Read the runs: one row for each recipe, branch and seed."""
    rows = []
    for name in names:
        for seed in seeds:
            found = RunFolder.open(folder / f"{name}-{seed}")
            seconds = float((found.path / "wall_seconds").read_text())
            commit = found.provenance()["commit"]
            for part, branch in (("start", found), *((b.path.name, b) for b in found.branches())):
                row = member(branch, part)
                rows.append({"recipe": SHELF + name, "seed": seed, "recipe_seconds": seconds, "commit": commit, **row})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write mean and range over the seeds, of the last epoch."""
    lines = ["| recipe, branch | method | clean | PGD-20 | trained | operations |", "|---|" + "---|" * 5]
    for recipe, branch in dict.fromkeys((row["recipe"], row["branch"]) for row in rows):
        found = [row for row in rows if (row["recipe"], row["branch"]) == (recipe, branch)]
        first = found[0]
        cells = [
            f"`{recipe.removeprefix(SHELF)}` {branch}",
            first["method"],
            spread([row["last"]["clean"] for row in found]),
            spread([row["last"]["pgd-20"] for row in found]),
            f"{100 * first['trainable_share']:.1f} %",
            f"{statistics.mean(row['flops_relative_to_pgd_at'] for row in found):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(accuracies: Sequence[float]) -> str:
    """Mean and range, in percent."""
    low, mean, high = (100 * value for value in (min(accuracies), statistics.mean(accuracies), max(accuracies)))
    return f"{mean:.1f} ({low:.1f} - {high:.1f})"


def main() -> None:
    """Run, gather, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread (default: 1)")
    parser.add_argument("--recipes", nargs="+", help="default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shelf = [name.removeprefix(SHELF) for name in recipe_names() if name.startswith(SHELF)]
    names = options.recipes or sorted(shelf, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    work = [(name, seed) for seed in options.seeds for name in names]
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, seed), done in [(item, pool.submit(run, *item, options.folder)) for item in work]:
            try:
                done.result()
            except subprocess.CalledProcessError as error:
                sys.exit(f"{name} with seed {seed}: {error.stderr}")
            sys.stderr.write(f"{name}, seed {seed}\n")
    rows = gather(names, options.seeds, options.folder)
    if options.json:
        facts = RunFolder.open(options.folder / f"{names[0]}-{options.seeds[0]}").provenance()
        machine = {
            key: facts[key] for key in ("device", "threads", "cores", "python", "system", "versions", "precision")
        }
        command = f"toughen train {SHELF}NAME train.seed=SEED"
        found = {"command": command, "provenance": machine, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
