"""Every built-in model: its size next to the published one, and one step of PGD-AT and of CLAT on two images.

    python benchmarks/models.py --json results/models.json

Each model runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import toughen as tg
from toughen.engine.provenance import provenance
from toughen.layers import map_layers
from toughen.models import MODELS

# millions, 10 classes; where from is said in docs/models.md
PUBLISHED = {
    "resnet18": 11.17,
    "resnet50": 23.52,
    "densenet121": 6.956,
    "wrn34_10": 46.16,
    "wrn70_16": 266.8,
    "vgg19": 20.04,
}


def measure(name: str) -> dict[str, Any]:
    """Build one model and take the two steps."""
    torch.manual_seed(0)
    model = tg.models.create(name, num_classes=10, seed=0)
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([3, 7])
    layers = map_layers(model, x)
    pgd = tg.PGD(tg.ThreatModel(eps=8 / 255), step_size=2 / 255, steps=10)
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "published_millions": PUBLISHED.get(name),
        "convolutions": sum(not layer.classifier for layer in layers),
        "first_layers": [layer.name for layer in layers[:3]],
        "forward_gflops_per_image": _forward_flops(model, x) / len(x) / 1e9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    clat = tg.CLAT(k=3).bind(model, attack=pgd, seed=0)
    for step, live in (("pgd_at", tg.PGDAT().bind(model, attack=pgd, seed=0)), ("clat", clat)):
        if step == "clat":
            clat.epoch_start(0, [(x, y)], optimizer=optimizer)
            facts["selected"] = list(clat.selected or ())
        started = time.perf_counter()
        loss = live(x, y).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        facts[f"{step}_seconds"] = time.perf_counter() - started
        facts[f"{step}_loss"] = float(loss.detach())
    facts["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return facts


def _forward_flops(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Count the floating-point operations of one forward; a multiplication and an addition are two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def main() -> None:
    """Run all models one after the other, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="default: all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    found = {}
    table = Table(
        "model", "parameters", "published", "convolutions", "forward GFLOPs", "PGD-AT s", "CLAT s", "peak GiB"
    )
    for name in options.models:
        command = [sys.executable, __file__, "--one", name]
        found[name] = facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)  # noqa: S603
        published = facts["published_millions"]
        table.add_row(
            name,
            f"{facts['parameters'] / 1e6:.3f} M",
            f"{published} M" if published else "",
            str(facts["convolutions"]),
            f"{facts['forward_gflops_per_image']:.2f}",
            f"{facts['pgd_at_seconds']:.1f}",
            f"{facts['clat_seconds']:.1f}",
            f"{facts['peak_memory_gib']:.2f}",
        )
    Console().print(table)
    if options.json:
        facts = provenance(seed=0, device=torch.device("cpu"), precision="32-true")
        options.json.write_text(json.dumps({**facts, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
