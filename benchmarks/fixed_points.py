"""How many images a PGD attack stops moving, step by step: what an early exit for them could save.

    python benchmarks/fixed_points.py RUN --json results/fixed_points.json

An iterate that a step leaves where it is stays there, since the model is deterministic in eval mode.
"""

import argparse
import json
from pathlib import Path

import torch
from told import positive, told

from toughen import data
from toughen.attacks import PGD
from toughen.cli.files import check_output
from toughen.config import resolve
from toughen.engine import checkpoint
from toughen.engine.build import create_model
from toughen.engine.provenance import provenance
from toughen.run_folder import RunFolder


def main() -> None:
    """Attack step by step and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=positive, default=500)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_output(None if options.json is None else str(options.json))
    run = RunFolder.open(options.run)
    recipe = resolve(run.config())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = data.load(recipe.data, device=device)
    model = create_model(recipe.model, splits, seed=0).to(device).eval()
    checkpoint.load(run.checkpoints / "last", model)
    images = splits.test.subset(slice(options.samples))
    (batch,) = data.in_order(images, batch_size=len(images), device=device)
    x, y = batch.x, batch.y
    draw = torch.Generator(device).manual_seed(0)
    eps, step_size = recipe.threat.eps, recipe.attack.step_size
    step = PGD(recipe.threat, step_size=step_size, steps=1, random_start=False)
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps, generator=draw)).clamp(*recipe.threat.bounds)
    rows = []
    for number in range(1, options.steps + 1):
        moved = step(model, x, y, start=x_adv)
        pixels = (moved != x_adv).flatten(1).float().mean(dim=1)
        rows.append({"step": number, "images_at_rest": int((pixels == 0).sum()), "pixels_moved": float(pixels.mean())})
        print(rows[-1])
        x_adv = moved
    if options.json:
        facts = provenance(seed=0, device=device, precision="32-true")
        found = {"provenance": facts, "n": len(images), "eps": eps, "step_size": step_size, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(told(main))
