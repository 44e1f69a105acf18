"""Compare AutoAttack as Toughen drives it with the published package's own run, sample by sample, side by side.

python benchmarks/autoattack.py TARGET --samples 100 --repeats 2 --json results/autoattack.json

TARGET and further options are those of `toughen evaluate`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from toughen import data
from toughen.cli.grammar import make_parser
from toughen.cli.target import find_target
from toughen.cli.verbs import VERBS
from toughen.engine.provenance import provenance
from toughen.evaluation import evaluate, parse_attack

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square", "standard")


def published(model: nn.Module, x: Tensor, y: Tensor, name: str, eps: float, seed: int, batch_size: int) -> Tensor:
    """Run the package as its users do, and return which samples stand."""
    attack = AutoAttack(model, norm="Linf", eps=eps, seed=seed, version="standard", device=x.device)
    if name != "standard":
        attack.attacks_to_run = [name]
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    with torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x_adv.split(batch_size)]) == y


def main() -> None:
    """Measure both, interleaved, and write what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2, help="of each timing; both take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options, more = parser.parse_known_args()

    target = find_target(make_parser(VERBS).parse_args(["evaluate", options.target, "--device", "cpu", *more]))
    images = target.splits.test.subset(slice(options.samples))
    batches = list(data.in_order(images, batch_size=options.batch_size, device="cpu"))
    x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
    model = target.model.eval()
    rows: list[dict[str, Any]] = []
    for name in ATTACKS:
        attack = parse_attack(name, threat=target.threat, step_size=target.step_size)
        ours_seconds, package_seconds = [], []
        for _ in range(options.repeats):
            started = time.perf_counter()
            ours = evaluate(model, batches, [attack], seed=options.seed, sanity=False)[name]
            ours_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            package = published(model, x, y, name, target.threat.eps, options.seed, options.batch_size)
            package_seconds.append(time.perf_counter() - started)
        differing = [i for i, (a, b) in enumerate(zip(ours.correct, package.tolist(), strict=True)) if a != b]
        row = {
            "attack": name,
            "n": ours.n,
            "accuracy": ours.accuracy,
            "accuracy_package": float(package.float().mean()),
            "differing": differing,
            "seconds": min(ours_seconds),
            "seconds_package": min(package_seconds),
            "forwards": sum(stage.forwards for stage in ours.stages),
            "backwards": sum(stage.backwards for stage in ours.stages),
        }
        rows.append(row)
        print(
            f"{name:<9} ours {100 * row['accuracy']:5.1f}  package {100 * row['accuracy_package']:5.1f}  "
            f"differing {len(differing)} of {row['n']}  seconds {row['seconds']:.1f} and {row['seconds_package']:.1f} "
            f"(ratio {row['seconds'] / row['seconds_package']:.2f})",
            flush=True,
        )
    if options.json:
        settings = {
            "eps": target.threat.eps,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "model": type(model).__name__,
            "data": target.splits.name,
        }
        facts = provenance(seed=options.seed, device=torch.device("cpu"), precision="32-true")
        # where the weights and images lie is nobody's business
        facts["command"] = f"autoattack.py TARGET --samples {options.samples} --batch-size {options.batch_size}"
        content = {"provenance": facts, "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
