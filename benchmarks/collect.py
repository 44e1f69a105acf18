"""Gather finished runs, which differ in their seed, into one file of results/.

python benchmarks/collect.py runs/digits-0 runs/digits-1 runs/digits-2 --json results/digits.json
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toughen.run_folder import RunFolder


def member(run: RunFolder, name: str) -> dict[str, Any]:
    """Describe a run, or one branch of it, as plain values."""
    log = run.log()
    results = {name: run.evaluations(name) for name in ("last", "best")}
    accuracies = {
        name: {"epoch": next(iter(found.values()))["epoch"], **{a: r["accuracy"] for a, r in found.items()}}
        for name, found in results.items()
    }
    return {
        "branch": name,
        "method": log[-1]["method"],
        "epochs": log[-1]["epoch"],
        "n": next(iter(results["last"].values()))["n"],
        "trainable_share": log[-1]["trainable_share"],
        "median_seconds_per_epoch": statistics.median(row["seconds"] for row in log),
        "flops_relative_to_pgd_at": statistics.mean(
            row["gflops_per_image"] / row["pgd_at_gflops_per_image"] for row in log
        ),
        "lam": log[-1].get("lam"),
        "selections": {str(epoch): report["selected"] for epoch, report in run.reports().items()},
        "selected_numbers": {str(epoch): numbers(report) for epoch, report in run.reports().items()},
        "robust_validation_accuracy": {
            str(row["epoch"]): row["validation"]["robust"] for row in log if "validation" in row
        },
        **accuracies,
    }


def numbers(report: Mapping[str, Any]) -> list[int]:
    """Return the selected layers as the paper numbers them, by order of execution."""
    by_name = {layer["name"]: layer["index"] for layer in report["layers"]}
    return [by_name[name] for name in report["selected"]]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = []
    for run in map(RunFolder.open, options.runs):
        provenance = json.loads((run.path / "provenance.json").read_text())
        rows = [member(run, "start"), *(member(branch, branch.path.name) for branch in run.branches())]
        found.append({"seed": provenance["seed"], "provenance": provenance, "rows": rows})
    options.json.write_text(json.dumps({"runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
