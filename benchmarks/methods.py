"""Count what one training step of every method costs, next to one of PGD-AT. Counts do not depend on the machine.

python benchmarks/methods.py --json results/method_costs.json --markdown docs/methods/costs.md
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toughen import PGD, ThreatModel, models
from toughen.config import resolve
from toughen.engine.flops import flops_per_image
from toughen.engine.provenance import provenance
from toughen.methods import Stack
from toughen.objectives import Live
from toughen.types import Batch

PGD_AT = {"name": "pgd-at"}
CLAT = {"name": "clat", "k": 1, "select": "fixed", "layers": ["layer2.0.conv1"]}
STACKS: list[list[dict[str, Any]]] = [
    [PGD_AT],
    [{"name": "clean"}],
    [{"name": "trades"}],
    [{"name": "mart"}],
    [{"name": "pgd-at-lse"}],
    [{"name": "trades-lse"}],
    [{"name": "rst"}],
    [{"name": "alp"}],
    [{"name": "feature-at", "layers": ["layer2.0.conv1"]}],
    [{"name": "fast-at"}],
    [{"name": "free-at"}],
    [{"name": "gradalign"}],
    [{"name": "autolora"}],
    [PGD_AT, {"name": "awp"}],
    [PGD_AT, {"name": "swa"}],
    [PGD_AT, {"name": "ema"}],
    [PGD_AT, {"name": "carry-over"}],
    [PGD_AT, {"name": "lora"}],
    [PGD_AT, {"name": "rift", "layer": "layer2.0.conv1"}],
    [PGD_AT, {"name": "twins"}],
    [PGD_AT, CLAT],
    [PGD_AT, {**CLAT, "base": "inner", "lam": 0}],
    [PGD_AT, {**CLAT, "inner_max": "fgsm-rs"}],
    [{"name": "trades"}, {**CLAT, "base": "inner", "lam": 0}],
]
CONVOLUTION, BACKWARD = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
BATCH_SIZE = 4
# what makes the host wait for a device: reading a value, and shapes that depend on values
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)


class Counter(TorchDispatchMode):
    """Counts convolutions of an image forwards and backwards, and what would make a host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = self.waits = 0  # of all images together

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in (CONVOLUTION, BACKWARD):
            # the input, or the gradient of the output; a second derivative convolves channels with channels
            num_images = len(args[0]) if len(args[0]) <= 2 * BATCH_SIZE else BATCH_SIZE
            self.forwards += num_images * (packet is CONVOLUTION)
            self.backwards += num_images * (packet is BACKWARD)
        self.waits += packet in WAITS
        return func(*args, **(kwargs or {}))


def measure(methods: list[dict[str, Any]], *, width: int) -> dict[str, Any]:
    """Count one step of a stack on ResNet-18 with images of 32x32; all of it per image but the waits."""
    stack = resolved(methods)
    model = models.create("resnet18", num_classes=10, width=width, seed=0).train()
    size = sum(parameter.numel() for parameter in model.parameters())
    attack = PGD(ThreatModel(eps=8 / 255), step_size=2 / 255, steps=10)
    live: Live = stack.bind(model, attack=attack)
    draw = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(BATCH_SIZE, 3, 32, 32, generator=draw), *[torch.arange(BATCH_SIZE)] * 2)
    live.epoch_start(0, [(batch.x, batch.y)])
    flops = flops_per_image(live, batch)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    optimizer = torch.optim.SGD(live.parameters(), lr=0.01)
    live.on(batch)  # what a first step looks up is no part of the others
    with Counter() as counter:
        for _ in range(live.replays):
            loss = live.on(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            live.step_end()
    live.epoch_end([(batch.x, batch.y)])
    return {
        "method": stack.label,
        "settings": methods,
        "forwards": counter.forwards / convolutions / len(batch.x),
        "backwards": counter.backwards / convolutions / len(batch.x),
        "gflops_per_image": flops / 1e9,
        "waits": counter.waits,
        "trained_share": sum(p.numel() for p in live.trainable()) / size,
        "further_state": state_size(live.state_dict()) / size,
    }


def resolved(methods: list[dict[str, Any]]) -> Stack:
    """Make the stack as a recipe would."""
    recipe = {
        "model": {"name": "resnet18"},
        "data": {"name": "cifar10"},
        "threat": {"eps": "8/255"},
        "attack": {"name": "pgd", "step_size": "2/255"},
        "method": methods,
        "train": {"epochs": 1},
    }
    return resolve(recipe).method


def state_size(state: Any) -> int:
    """Return the number of values in the tensors of a nested state."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, Mapping):
        return sum(map(state_size, state.values()))
    return sum(map(state_size, state)) if isinstance(state, list | tuple) else 0


def page(rows: list[dict[str, Any]]) -> str:
    """Write the table."""
    base = rows[0]["gflops_per_image"]
    lines = ["| method | forwards | backwards | operations | waits | trained | further state |", "|---|" + "---|" * 6]
    for found in rows:
        cells = [
            found["method"] + note(found["settings"]),
            f"{found['forwards']:.2f}",
            f"{found['backwards']:.2f}",
            f"{found['gflops_per_image'] / base:.2f}",
            str(found["waits"]),
            f"{100 * found['trained_share']:.1f} %",
            f"{found['further_state']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return PREFACE + "\n".join(lines) + "\n"


def note(methods: list[dict[str, Any]]) -> str:
    """Say which replays a label hides."""
    return ", 8 replays" if methods[0]["name"] == "free-at" else ""


PREFACE = """# What a step of every method costs

Counted on ResNet-18 with 32x32 images, PGD of 10 steps, each method at its defaults; CLAT and RiFT tune
`layer2.0.conv1`. Counts do not depend on the machine: `python benchmarks/methods.py --json results/method_costs.json
--markdown docs/methods/costs.md` repeats them.

- *forwards*, *backwards*: passes of each image through the network in one step, attack included; a pass that stops
  early counts for the share of convolutions that it runs, and the second derivatives of GradAlign for what they run.
- *operations*: floating-point operations of matrix products and convolutions per image, relative to PGD-AT.
- *waits*: how often the host would have to wait for the device.
- *trained*: parameters that train, relative to those of the network.
- *further state*: values that the method keeps beside the network, relative to its parameters; for four images,
  where it grows with their number (ATTA: one byte for each value of each image; Free-AT: one batch).

What is due once an epoch is not in the table: a selection of CLAT (one attack and one forward on 100 images), the
re-estimation of SWA (one forward of all training images), the accuracy that AutoLoRA measures, RiFT's ranking of all
layers (once a run).

"""


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default: 64)")
    options = parser.parse_args()
    rows = [measure(methods, width=options.width) for methods in STACKS]
    if options.json:
        facts = provenance(seed=0, device=torch.device("cpu"), precision="32-true")
        found = {"provenance": facts, "width": options.width, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
