"""Fewer passes per step at equal strength: robust accuracy after training for equally many operations.

    python benchmarks/fewer_passes.py ../shared/data/cifar10 runs/fewer --seeds 0 1 2 --json results/fewer_passes.json

Each attack trains the same network on the same images with the same schedule, for as many epochs as spend what PGD-10
spends in ``EPOCHS``; then a run of PGD-10 goes on with CLAT, whose attack varies alike, for equally many epochs. A run
that was stopped goes on where it was; finished ones are read.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from told import told

from toughen.cli.files import check_output
from toughen.config import resolve
from toughen.engine import Trainer
from toughen.engine.flops import flops_per_image
from toughen.engine.provenance import provenance
from toughen.models import create
from toughen.run_folder import RunFolder
from toughen.types import Batch

EPOCHS = 12
PGD_AT = {"name": "pgd-at"}
ATTACKS: dict[str, dict[str, Any]] = {
    "PGD-10, step 2/255": {"attack": {"steps": 10, "step_size": "2/255"}},
    "PGD-5, step 4/255": {"attack": {"steps": 5, "step_size": "4/255"}},
    "PGD-3, step 6/255": {"attack": {"steps": 3, "step_size": "6/255"}},
    "carried over, 2 steps of 4/255": {
        "attack": {"steps": 2, "step_size": "4/255"},
        "method": [{"name": "carry-over"}],
    },
    "carried over, 1 step of 4/255": {"attack": {"steps": 1, "step_size": "4/255"}, "method": [{"name": "carry-over"}]},
    "FGSM-RS, step 10/255": {"attack": {"steps": 1, "step_size": "10/255"}},
}
CLAT = {"name": "clat", "k": 1, "lam": 0.03, "lr_scale": 0.1}
ON_TOP: dict[str, dict[str, Any]] = {
    "pgd-10": {"method": [CLAT]},
    "pgd-3": {"method": [CLAT], "attack": {"steps": 3, "step_size": "6/255"}},
    "carried-over-2": {
        "method": [CLAT, {"name": "carry-over", "start_epoch": EPOCHS}],
        "attack": {"steps": 2, "step_size": "4/255"},
    },
    "fgsm-rs": {"method": [{**CLAT, "inner_max": "fgsm-rs"}]},
}


def recipe(data: str, seed: int, change: dict[str, Any], *, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return a recipe with another attack, and methods behind PGD-AT."""
    return {
        "model": {"name": "resnet18", "width": 16},
        "data": {
            "name": "cifar10",
            "path": data,
            "image_size": 16,
            "train_samples": 3000,
            "validation": 500,
            "test_samples": 1000,
            "augment": [{"name": "crop_flip", "pad": 2}],
        },
        "threat": {"norm": "linf", "eps": "8/255"},
        "attack": {"name": "pgd", **change["attack"]},
        "method": [PGD_AT, *change.get("method", [])],
        "train": {"epochs": epochs, "batch_size": 64, "lr": 0.1, "seed": seed, "validate_every": epochs},
        "evaluate": {"attacks": ["clean", "pgd-50"], "step_size": "1/255"},
    }


def continued(data: str, seed: int) -> dict[str, Any]:
    """Return a recipe of PGD-10 that goes on with CLAT in several ways from its middle."""
    whole = recipe(data, seed, ATTACKS["PGD-10, step 2/255"], epochs=2 * EPOCHS)
    branches = {name: {**change, "method": [PGD_AT, *change["method"]]} for name, change in ON_TOP.items()}
    return {**whole, "branch_epoch": EPOCHS, "branches": branches}


def operations(content: dict[str, Any]) -> float:
    """Operations of a step per image."""
    wanted = resolve(content)
    model = create(wanted.model.name, num_classes=10, seed=0, width=16)
    batch = Batch(torch.rand(4, 3, 16, 16), torch.arange(4), torch.arange(4))
    live = wanted.method.bind(model, attack=wanted.attack)
    live.epoch_start(0, [(batch.x, batch.y)])
    return flops_per_image(live, batch)


def trained(content: dict[str, Any], folder: Path) -> RunFolder:
    """Run a recipe, or go on with it, or read what it found."""
    resume = (folder / "config.yaml").is_file()
    return Trainer(resolve(content), out=folder, resume=resume, show_progress=False).fit()


def row(name: str, run: RunFolder, seed: int, base: float) -> dict[str, Any]:
    """What a run, or a branch, cost and reached."""
    log, found = run.log(), run.evaluations("last")
    return {
        "seed": seed,
        "attack": name,
        "epochs": log[-1]["epoch"],
        "operations": log[-1]["gflops_per_image"] * 1e9 / base,
        "seconds": sum(line["seconds"] for line in log),
        **{attack: one["accuracy"] for attack, one in found.items()},
        "n": next(iter(found.values()))["n"],
        "commit": run.provenance()["commit"],
    }


def main() -> None:
    """Train what is missing, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", help="a local copy of CIFAR-10")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    check_output(str(options.json))
    base = operations(recipe(options.cifar10, 0, ATTACKS["PGD-10, step 2/255"]))
    alone: list[dict[str, Any]] = []
    on_top: list[dict[str, Any]] = []
    for seed in options.seeds:
        for number, (name, change) in enumerate(ATTACKS.items()):
            epochs = round(EPOCHS * base / operations(recipe(options.cifar10, seed, change)))
            run = trained(recipe(options.cifar10, seed, change, epochs=epochs), options.out / f"{seed}-{number}")
            alone.append(row(name, run, seed, base))
            print(alone[-1], flush=True)
        run = trained(continued(options.cifar10, seed), options.out / f"{seed}-clat")
        on_top.append(row("start", run, seed, base))
        on_top += [row(branch.path.name, branch, seed, base) for branch in run.branches()]
        facts = provenance(seed=seed, device=torch.device("cpu"), precision="32-true")
        options.json.write_text(json.dumps({"provenance": facts, "alone": alone, "clat": on_top}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(told(main))
