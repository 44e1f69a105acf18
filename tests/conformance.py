"""What every training method promises, alone and with CLAT on top, and the table of it.

``python tests/conformance.py`` writes docs/methods/conformance.md; the tests compare each row with what they see.
"""

import io
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from small_runs import document, outcome, resume
from toughen import data, models
from toughen.config import resolve
from toughen.engine import Recipe, Trainer, create_model
from toughen.engine.optim import make_optimizer
from toughen.errors import InputError
from toughen.objectives import METHODS, Live
from toughen.types import Batch

PGD_AT = {"name": "pgd-at"}
CLAT = {"name": "clat", "k": 1, "base": "inner", "lam": 0.1}
SWA = {"name": "swa"}
# the smallest settings under which each method does all that it can do in two epochs
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "clean": [{"name": "clean"}],
    "pgd-at": [{"name": "pgd-at", "label_smoothing": 0.1}],
    "trades": [{"name": "trades"}],
    "mart": [{"name": "mart"}],
    "pgd-at-lse": [{"name": "pgd-at-lse"}],
    "trades-lse": [{"name": "trades-lse"}],
    "rst": [{"name": "rst"}],
    "alp": [{"name": "alp"}],
    "feature-at": [{"name": "feature-at", "layers": ["layer2.0.conv"]}],
    "fast-at": [{"name": "fast-at"}],
    "free-at": [{"name": "free-at", "replays": 2}],
    "gradalign": [{"name": "gradalign"}],
    "autolora": [{"name": "autolora", "rank": 2}],
    "adaptive-smoothing": [{"name": "adaptive-smoothing"}],
    "clat": [PGD_AT, {"name": "clat", "k": 1, "start_epoch": 1}],
    "clat-paper": [PGD_AT, {"name": "clat-paper", "k": 1, "lam": 0.03, "start_epoch": 1}],
    "awp": [PGD_AT, {"name": "awp"}],
    "swa": [PGD_AT, SWA],
    "ema": [PGD_AT, {"name": "ema"}],
    "carry-over": [PGD_AT, {"name": "carry-over"}],
    "lora": [PGD_AT, {"name": "lora", "rank": 2}],
    "rift": [PGD_AT, {"name": "rift", "start_epoch": 1, "samples": 20, "mrc_epochs": 1}],
    "twins": [PGD_AT, {"name": "twins"}],
}
COLUMNS = (
    "label",
    "trains two steps",
    "loss finite",
    "gradients only where due",
    "frozen bit-identical",
    "resume bit-identical",
    "state saves and loads",
    "X + CLAT",
    "X + CLAT + SWA",
)


class PowerCutError(Exception):
    """What stops a run from inside."""


def with_clat(methods: list[dict[str, Any]], *further: dict[str, Any]) -> list[dict[str, Any]]:
    """X + CLAT: behind the method, or in front of one that must come last."""
    *inner, last = methods
    if last["name"].startswith("clat"):
        return [*methods, *further]
    return [*inner, CLAT, last, *further] if last["name"] in ("rift", "swa", "ema") else [*methods, CLAT, *further]


class Loop:
    """Anybody's training loop, on a few of the embedded digits: what ``Live`` asks of it, and nothing else."""

    def __init__(self, methods: list[dict[str, Any]], folder: Path) -> None:
        self.recipe = small(methods, folder)
        self.splits = data.load(self.recipe.data)
        self.model = create_model(self.recipe.model, self.splits)
        self.live: Live = self.recipe.method.bind(self.model, attack=self.recipe.attack)
        self.optimizer = make_optimizer(self.live, self.recipe.train)
        self.losses: list[float] = []

    def batches(self) -> Iterator[Batch]:
        images = self.splits.train if self.splits.extra is None else self.splits.extra
        yield from data.in_order(images, batch_size=10, device="cpu")

    def epoch(self, number: int, *, steps: int = 2) -> None:
        self.model.train()
        self.live.epoch_start(number, [(b.x, b.y) for b in self.batches()], optimizer=self.optimizer)
        for batch, _ in zip(self.batches(), range(steps), strict=False):
            for _ in range(self.live.replays):
                self.step(batch)
        self.live.epoch_end((b.x, b.y) for b in self.batches())

    def step(self, batch: Batch) -> None:
        output = self.live.on(batch)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.optimizer.step()
        self.live.step_end()
        self.losses.append(float(output.loss.detach()))

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.live.named_parameters().items()}


def small(methods: list[dict[str, Any]], folder: Path) -> Recipe:
    """A recipe of seconds around a method; methods that need more images find some unlabelled ones."""
    sections: dict[str, Any] = {"method": methods, "train": {"epochs": 2, "batch_size": 20, "checkpoint_steps": 1}}
    sections["data"] = {"train_samples": 40, "test_samples": 10, "validation": 10}
    if any(METHODS[m["name"]].needs_extra for m in methods):
        file = folder / "extra.npz"
        draws = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
        np.savez(file, image=draws, label=np.arange(20) % 4 - 1)
        sections["data"]["extra"] = {"path": str(file), "fraction": 0.5}
    plain = document(**sections)
    if methods[0]["name"] == "adaptive-smoothing":
        plain["model"] = {"name": "adaptive_smoothing", **{part: base(folder, part) for part in ("accurate", "robust")}}
    return resolve(plain)


def base(folder: Path, name: str) -> dict[str, Any]:
    """One of the two networks of a mixture, with a file of weights."""
    file = folder / f"{name}.safetensors"
    save_file(models.create("small_cnn", width=2, in_channels=1, seed=len(name)).state_dict(), file)
    return {"name": "small_cnn", "width": 2, "weights": str(file), "mean": [0.5], "std": [0.5]}


def yes(right: bool) -> str:
    return "yes" if right else "NO"


def row(name: str, folder: Path) -> dict[str, str]:
    """See each promise of one method kept, or not."""
    methods = EXAMPLES[name]
    loop = Loop(methods, folder)
    loop.epoch(0)
    before = loop.values()
    loop.epoch(1)
    due = [p.requires_grad for p in loop.live.parameters()]
    graded = [p.grad is not None for p in loop.live.parameters()]
    after = loop.values()
    frozen = [n for n, p in loop.live.named_parameters().items() if not p.requires_grad]
    return {
        "label": loop.recipe.method.label,
        "trains two steps": yes(any(not torch.equal(before[n], after[n]) for n in after)),
        "loss finite": yes(all(map(math.isfinite, loop.losses))),
        "gradients only where due": yes(graded == due),
        "frozen bit-identical": yes(all(torch.equal(before[n], after[n]) for n in frozen)) if frozen else "-",
        "resume bit-identical": yes(resumes(methods, folder)),
        "state saves and loads": yes(continues(loop)),
        "X + CLAT": trains(with_clat(methods), folder),
        "X + CLAT + SWA": trains(with_clat(methods, SWA), folder),
    }


def resumes(methods: list[dict[str, Any]], folder: Path) -> bool:
    """Whether a run that loses power inside its last epoch ends as if it had not."""
    wanted, step, steps = small(methods, folder), Trainer._step, 0

    def cut(self: Trainer, batch: Batch) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise PowerCutError
        step(self, batch)

    whole = Trainer(wanted, out=folder / "whole", show_progress=False).fit()
    with patch.object(Trainer, "_step", cut), suppress(PowerCutError):
        Trainer(wanted, out=folder / "cut", show_progress=False).fit()
    return outcome(resume(folder / "cut")) == outcome(whole)


def continues(loop: Loop) -> bool:
    """Whether a live method made anew from saved state goes on with the same loss, bit for bit."""
    file = io.BytesIO()
    torch.save({"live": loop.live.state_dict(), "weights": loop.model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = create_model(loop.recipe.model, loop.splits, seed=1)
    live = loop.recipe.method.bind(model, attack=loop.recipe.attack)
    model.load_state_dict(saved["weights"])
    live.load_state_dict(saved["live"])
    model.train()
    loop.model.train()
    batch = next(iter(loop.batches()))
    return torch.equal(deepcopy(loop.live).on(batch).loss, live.on(batch).loss)


def trains(methods: list[dict[str, Any]], folder: Path) -> str:
    """Train two epochs, at least the second on selected layers; tell the reason where a rule forbids the stack."""
    if [m["name"] for m in methods].count("swa") == 2:
        methods = methods[:-1]
    try:
        loop = Loop(methods, folder)
    except InputError as error:
        return f"refused: {error}"
    for number in range(2):
        loop.epoch(number)
    network: nn.Module = loop.live.deployed()
    x = next(iter(loop.batches())).x
    finite = all(map(math.isfinite, loop.losses)) and bool(torch.isfinite(network.eval()(x)).all())
    frozen = any(not parameter.requires_grad for parameter in loop.live.parameters())
    return yes(finite and frozen and loop.live.selected is not None)


def table(rows: dict[str, dict[str, str]]) -> str:
    """Write the rows as a Markdown page."""
    head = ["method", *COLUMNS]
    lines = [" | ".join(["", *cells, ""]).strip() for cells in (head, ["---"] * len(head))]
    for name, cells in rows.items():
        lines.append(line(name, cells))
    return PREFACE + "\n".join(lines) + "\n"


def line(name: str, cells: dict[str, str]) -> str:
    return " | ".join(["", f"`{name}`", *(cells[column] for column in COLUMNS), ""]).strip()


PREFACE = """# What every method promises

Each row is one method in the smallest stack in which it makes sense, trained on a few of the embedded digits. A test
computes every cell anew and compares it with this page; `python tests/conformance.py` writes it.

- *gradients only where due*: after a step, exactly the parameters that train have a gradient; all others have none.
- *resume*: a run cut inside an epoch ends with the same bits in weights, log, selections and evaluations.
- *X + CLAT*: `base: inner`; CLAT stands behind the method, or in front of one that must come last.

"""


def main() -> None:
    """Write the page."""
    rows = {}
    for name in EXAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(name, Path(folder))
        sys.stderr.write(line(name, rows[name]) + "\n")
    (Path(__file__).parents[1] / "docs" / "methods" / "conformance.md").write_text(table(rows))


if __name__ == "__main__":
    main()
