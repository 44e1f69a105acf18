"""How fast a training step is: ours, the loop that everybody writes, other libraries, and each of our settings alone.

    python benchmarks/speed.py steps --json results/speed_cpu.json
    python benchmarks/speed.py settings --json results/speed_cpu.json
    python benchmarks/speed.py counts --json results/speed_cpu.json
    python benchmarks/speed.py page --json results/speed_cpu.json

The contenders of ``steps`` and ``settings`` take turns within each round, on the same random images (none of the work
depends on what an image shows) and with a learning rate of 0, so that all meet the same weights and the same state of
the machine; medians over the rounds are reported, and ratios within a round. Each round is written to the file at once:
a run that was stopped goes on where it was, and ``--minutes`` stops it by itself. ``counts`` does not time: operations
and bytes are the same on every machine. On CUDA give ours ``--precision bf16-mixed --compile --cuda-graph``.
"""

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from told import positive, told
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from toughen import models
from toughen.attacks import PGD
from toughen.cli.files import check_output, write
from toughen.engine.flops import OperationCounter, flops_per_image
from toughen.engine.provenance import provenance
from toughen.errors import InputError
from toughen.layers import compile_forward, map_layers
from toughen.methods import CLAT, CarryOver, stack
from toughen.objectives import PGDAT, TRADES, Live, Method
from toughen.types import Batch, ThreatModel

THREAT = ThreatModel(eps=8 / 255)
STEP_SIZE = 2 / 255
PAPER = {"resnet18": (11,), "resnet50": (34, 41, 48), "densenet121": (39, 14, 1, 3, 88)}  # Table 19 and section 4
out = Console()


@dataclass(frozen=True)
class Setup:
    """What all contenders of a run share."""

    model: str = "resnet18"
    width: int = 64
    batch_size: int = 64
    steps: int = 10
    precision: str = "32-true"
    compile: bool = False
    cuda_graph: bool = False
    only_counts: bool = False  # operations can't be seen in what is compiled

    @property
    def device(self) -> torch.device:
        """Return the GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def network(self) -> nn.Module:
        """Return a fresh network in train mode, always with the same weights."""
        options = {} if self.width == 64 else {"width": self.width}
        return models.create(self.model, num_classes=10, seed=0, **options).to(self.device).train()

    def batch(self) -> Batch:
        """Return the images that all contenders see."""
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch_size, 3, 32, 32, generator=draw)
        y = torch.randint(10, (self.batch_size,), generator=draw)
        return Batch(x.to(self.device), y.to(self.device), torch.arange(self.batch_size, device=self.device))

    def attack(self, **settings: Any) -> PGD:
        """Return PGD as recipes have it."""
        return PGD(THREAT, **{"step_size": STEP_SIZE, "steps": self.steps, "cuda_graph": self.cuda_graph, **settings})


Step = Callable[[], None]


# -- what everybody writes ------------------------------------------------------------------------


def plain_pgd_at(setup: Setup, *, weight_gradients: bool) -> Step:
    """Return PGD-AT as most repositories write it; without ``weight_gradients`` as the careful ones do."""
    model, (x, y, *_) = setup.network(), setup.batch()
    optimizer = momentum_sgd(model)

    def perturbed() -> Tensor:
        x_adv = (x + torch.empty_like(x).uniform_(-THREAT.eps, THREAT.eps)).clamp(0, 1)
        for _ in range(setup.steps):
            x_adv = x_adv.detach().requires_grad_(True)
            loss = F.cross_entropy(model(x_adv), y)
            if weight_gradients:
                loss.backward()
                gradient = x_adv.grad
            else:
                (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - THREAT.eps), x + THREAT.eps).clamp(0, 1)
        return x_adv.detach()

    return ordinary_step(model, optimizer, y, perturbed)


def plain_trades(setup: Setup) -> Step:
    """Return TRADES as its official code has it: the clean images are looked at again in each step of the attack."""
    model, (x, y, *_) = setup.network(), setup.batch()
    optimizer = momentum_sgd(model)
    divergence = nn.KLDivLoss(reduction="sum")

    def step() -> None:
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(setup.steps):
            x_adv = x_adv.detach().requires_grad_(True)
            loss = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + STEP_SIZE * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - THREAT.eps), x + THREAT.eps).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        robust = divergence(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)) / len(x)
        (F.cross_entropy(logits, y) + 6.0 * robust).backward()
        optimizer.step()

    return step


def ordinary_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, y: Tensor, perturbed: Callable[[], Tensor]
) -> Step:
    """Return a step that attacks in eval mode and trains on what it finds."""

    def step() -> None:
        model.eval()
        x_adv = perturbed()
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()

    return step


def momentum_sgd(model: nn.Module | Live) -> torch.optim.SGD:
    """Return an optimizer that does all of its work and moves nothing."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


# -- ours -----------------------------------------------------------------------------------------


def bound(setup: Setup, method: Method, attack: PGD, *, channels_last: bool = True) -> tuple[Live, Batch]:
    """Return a method bound as the trainer does it, with its layers selected."""
    model, batch = setup.network(), setup.batch()
    if channels_last:
        model.to(memory_format=torch.channels_last)
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
    if setup.compile and not setup.only_counts:
        compile_forward(model)
    live = method.bind(model, attack=attack)
    few = 16
    live.epoch_start(0, [(batch.x[:few], batch.y[:few])])
    model.train()
    return live, batch


def ours(setup: Setup, method: Method, *, channels_last: bool = True, **attack: Any) -> Step:
    """Return a step as the trainer does it."""
    live, batch = bound(setup, method, setup.attack(**attack), channels_last=channels_last)
    if any(isinstance(member, CarryOver) for member in getattr(method, "methods", ())):
        live.on(batch)
        live.epoch_start(1)  # what a first epoch collects is there now
    optimizer = momentum_sgd(live)
    half = setup.precision == "bf16-mixed"

    def step() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16) if half else nullcontext():
            loss = live.on(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        live.step_end()

    return step


def clat(setup: Setup, layers: tuple[int, ...], **settings: Any) -> CLAT:
    """Return CLAT with these layers selected, by their number in order of execution."""
    names = [layer.name for layer in map_layers(setup.network(), setup.batch().x[:1]).measurable]
    return CLAT(select="fixed", layers=tuple(names[number] for number in layers), lam=0.1, **settings)


# -- the parts ------------------------------------------------------------------------------------


def steps(setup: Setup) -> dict[str, Step]:
    """One training step: ours, the plain loop's, the peers'."""
    contenders = {
        "plain loop": plain_pgd_at(setup, weight_gradients=True),
        "plain loop, no weight gradients in the attack": plain_pgd_at(setup, weight_gradients=False),
        "plain TRADES": plain_trades(setup),
        "PGD-AT": ours(setup, PGDAT()),
        "TRADES": ours(setup, TRADES()),
        f"CLAT, conv {', '.join(map(str, PAPER[setup.model]))}": ours(setup, clat(setup, PAPER[setup.model])),
        "PGD-AT, carried over, 3 steps": ours(replace(setup, steps=3), stack(PGDAT(), CarryOver())),
        "CLAT, carried over, 3 steps": ours(
            replace(setup, steps=3), stack(PGDAT(), clat(setup, PAPER[setup.model]), CarryOver())
        ),
    }
    found, absent = peers.installed(eps=THREAT.eps, step_size=STEP_SIZE, steps=setup.steps)
    for peer in found:
        contenders[f"{peer.name} {peer.version}"] = peer_step(setup, peer)
    if not setup.only_counts:  # told once: counting makes the contenders too
        for name, reason in absent.items():
            out.print(f"left out: {name}, {reason}", highlight=False, soft_wrap=True)
    return contenders


def peer_step(setup: Setup, peer: peers.Peer) -> Step:
    """Return the library's own training step where it has one, else its attack in the plain loop."""
    model, (x, y, *_) = setup.network(), setup.batch()
    optimizer = momentum_sgd(model)
    if peer.step is not None:
        whole = peer.step
        return lambda: whole(model, optimizer, x, y)
    return ordinary_step(model, optimizer, y, lambda: peer.perturb(model, x, y))


def settings(setup: Setup) -> dict[str, Step]:
    """Ours with one thing changed at a time, for PGD-AT and for CLAT."""
    layers = PAPER[setup.model]
    compiled_name = "not compiled" if setup.compile else "compiled"
    half = replace(setup, precision="bf16-mixed" if setup.precision == "32-true" else "32-true")
    compiled = replace(setup, compile=not setup.compile)
    graph = {"cuda_graph": not setup.cuda_graph}
    on_cuda = {
        f"PGD-AT, cuda_graph={not setup.cuda_graph}": ours(setup, PGDAT(), **graph),
        f"CLAT, cuda_graph={not setup.cuda_graph}": ours(setup, clat(setup, layers), **graph),
    }
    return {
        "PGD-AT": ours(setup, PGDAT()),
        "PGD-AT, fold_norms=false": ours(setup, PGDAT(), fold_norms=False),
        "PGD-AT, contiguous": ours(setup, PGDAT(), channels_last=False),
        f"PGD-AT, {half.precision}": ours(half, PGDAT()),
        f"PGD-AT, {compiled_name}": ours(compiled, PGDAT()),
        "CLAT": ours(setup, clat(setup, layers)),
        "CLAT, fold_norms=false": ours(setup, clat(setup, layers), fold_norms=False),
        "CLAT, forward=full": ours(setup, clat(setup, layers, forward="full")),
        "CLAT, clean_forward=repeated": ours(setup, clat(setup, layers, clean_forward="repeated")),
        "CLAT, contiguous": ours(setup, clat(setup, layers), channels_last=False),
        f"CLAT, {compiled_name}": ours(compiled, clat(setup, layers)),
        **(on_cuda if setup.device.type == "cuda" else {}),
    }


TIMED: Mapping[str, Callable[[Setup], dict[str, Step]]] = {"steps": steps, "settings": settings}


def timed(part: str, setup: Setup, file: Path, *, rounds: int, minutes: float) -> None:
    """Take the rounds that the file lacks, and write each at once."""
    stored = load(file)
    facts = {**vars(setup), "device": setup.device.type}
    del facts["only_counts"]
    known = stored.get(part, {"setup": facts, "rounds": []})
    if known["setup"] != facts:
        raise InputError(f"{file} holds {part} of another setup, {known['setup']}; give another --json")
    if len(known["rounds"]) >= rounds:
        return
    ends = time.perf_counter() + 60 * minutes
    operations = counted(part, setup)
    contenders = TIMED[part](setup)
    if known["rounds"] and set(contenders) != set(known["rounds"][0]) - {"matrix product"}:
        others = ", ".join(sorted(set(contenders) ^ (set(known["rounds"][0]) - {"matrix product"})))
        raise InputError(
            f"{file} holds {part} of other contenders ({others}: there or here alone); give another --json"
        )
    multiply = product(setup)
    with Progress(console=out) as progress:
        bar = progress.add_task(part, total=(rounds - len(known["rounds"]) + 1) * len(contenders))
        for step in contenders.values():  # warms up: kernels are chosen, norms are found, graphs are recorded
            step()
            progress.advance(bar)
        while len(known["rounds"]) < rounds and time.perf_counter() < ends:
            found = {"matrix product": seconds(multiply, setup)}
            for name, step in contenders.items():
                found[name] = seconds(step, setup)
                progress.advance(bar)
            known["rounds"].append(found)
            known["operations"] = operations
            known["provenance"] = facts_of(setup)
            stored[part] = known
            write(str(file), json.dumps(stored, indent=1))


def counted(part: str, setup: Setup) -> dict[str, float]:
    """Floating-point operations of each step, from steps with few images."""
    few = replace(setup, batch_size=4, only_counts=True, cuda_graph=False)
    found = {}
    for name, step in TIMED[part](few).items():
        step()  # what a first step looks up is no part of the others
        with OperationCounter() as counter:
            step()
        found[name] = counter.total * setup.batch_size / few.batch_size
    return found


SIZE = 4096


def product(setup: Setup) -> Step:
    """Return a large matrix product in the precision of the run: what the machine can do at best."""
    dtype = torch.bfloat16 if setup.precision == "bf16-mixed" else torch.float32
    size = SIZE if setup.device.type == "cuda" else SIZE // 2
    a, b = (torch.rand(size, size, device=setup.device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, b)

    multiply()
    return multiply


def facts_of(setup: Setup) -> dict[str, Any]:
    """What must be known to repeat a run."""
    return provenance(seed=0, device=setup.device, precision=setup.precision)


def product_operations(device: str) -> int:
    """Operations of one call of ``product``."""
    size = SIZE if device == "cuda" else SIZE // 2
    return 10 * 2 * size**3


def seconds(step: Step, setup: Setup) -> float:
    """Time one call, with all that it started on the device."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# -- counts ---------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time: weights, images and optimizer state come on top."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


COUNTED = {
    "resnet18": ((4,), (9,), (11,), (14,), (19,)),
    "resnet50": (PAPER["resnet50"],),
    "densenet121": (PAPER["densenet121"],),
}


def counts(setup: Setup, file: Path) -> None:
    """Operations and peak bytes of CLAT's step next to PGD-AT's, and of a selection next to ten epochs."""
    if setup != Setup(width=setup.width, batch_size=setup.batch_size, steps=setup.steps):
        raise InputError("counts takes --width, --batch-size and --steps; its networks and its precision are its own")
    stored = load(file)
    known_setup = stored.get("counts", {}).get("setup", vars(setup))
    if known_setup != vars(setup):
        raise InputError(f"{file} holds counts of another setup, {known_setup}; give another --json")
    rows: list[dict[str, Any]] = stored.get("counts", {}).get("rows", [])
    known = {(row["model"], tuple(row["layers"])) for row in rows}
    for model, selections in COUNTED.items():
        of_model = replace(setup, model=model, batch_size=setup.batch_size if model == "resnet18" else 16)
        base: tuple[float, int] | None = None
        for layers in selections:
            if (model, layers) in known:
                continue
            base = base or work(of_model, PGDAT())
            rows.append({"model": model, "layers": layers, **compared(of_model, layers, base)})
            out.print(rows[-1])
            stored["counts"] = {"setup": vars(setup), "rows": rows, "provenance": facts_of(setup)}
            write(str(file), json.dumps(stored, indent=1))


def compared(setup: Setup, layers: tuple[int, ...], base: tuple[float, int]) -> dict[str, float]:
    """Everything relative to a step of PGD-AT, except the selection: relative to ten epochs of CLAT."""
    shared, repeated = (work(setup, clat(setup, layers, clean_forward=order)) for order in ("shared", "repeated"))
    full = work(setup, clat(setup, layers, forward="full"))
    carried = {
        f"operations_{steps}_steps": work(replace(setup, steps=steps), clat(setup, layers))[0] / base[0]
        for steps in (3, 2, 1)
    }
    return {
        "operations": shared[0] / base[0],
        "operations_repeated": repeated[0] / base[0],
        "operations_full": full[0] / base[0],
        **carried,
        "bytes": shared[1] / base[1],
        "bytes_repeated": repeated[1] / base[1],
        "selection": selection_share(setup, layers, shared[0]),
    }


def work(setup: Setup, method: Method) -> tuple[float, int]:
    """Return operations per image, and peak bytes, of one step."""
    live, batch = bound(setup, method, setup.attack())
    few = Batch(*(value[:2] for value in batch[:3]))
    flops = flops_per_image(live, few)
    optimizer = momentum_sgd(live)
    for _ in range(2):  # the first step makes the optimizer's state
        with PeakBytes() as memory:
            optimizer.zero_grad()
            loss = live.on(batch).loss
            loss.backward()
            optimizer.step()
            del loss
    return flops, memory.peak


def selection_share(setup: Setup, layers: tuple[int, ...], step: float, *, images: int = 50_000) -> float:
    """Operations of a selection on 100 images relative to the ten epochs that it serves."""
    probe = 8
    live, batch = bound(setup, replace(clat(setup, layers), every=1), setup.attack())
    with OperationCounter() as counter:
        live.epoch_start(1, [(batch.x[:probe], batch.y[:probe])])
    return 100 / probe * counter.total / (10 * images * step)


# -- reading --------------------------------------------------------------------------------------


def page(file: Path) -> None:
    """Print what the file holds."""
    stored = load(file)
    if not {*TIMED, "counts"} & set(stored):
        raise InputError(f"{file} holds no measurement; steps, settings or counts makes one, within enough --minutes")
    for part in TIMED:
        if part in stored:
            print(table(stored[part]))
    if "counts" in stored:
        rows = stored["counts"]["rows"]
        cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
        print(markdown(list(rows[0]), cells))


def table(found: Mapping[str, Any]) -> str:
    """Medians, ratios to the first contender within rounds, and the share of the machine's matrix product."""
    setup, rounds = found["setup"], found["rounds"]
    names = [name for name in rounds[0] if name != "matrix product"]
    peak = product_operations(setup["device"]) / statistics.median(r["matrix product"] for r in rounds)
    cells = []
    for name in names:
        median = statistics.median(r[name] for r in rounds)
        ratios = [r[names[0]] / r[name] for r in rounds]
        operations = found["operations"][name]
        cells.append(
            [
                name,
                f"{setup['batch_size'] / median:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{operations / found['operations'][names[0]]:.2f}",
                f"{100 * operations / median / peak:.0f} %",
            ]
        )
    what = f"{setup['model']}, batch {setup['batch_size']}, PGD-{setup['steps']}, {setup['precision']}"
    title = f"{what}, {len(rounds)} rounds"
    return f"{title}\n\n" + markdown(["step", "images/s", "speed", "operations", "of the matrix peak"], cells)


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """Write a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows]) + "\n"


def load(file: Path) -> dict[str, Any]:
    """Read what is there already."""
    try:
        stored = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {file}: {error}; give another --json") from None
    if not isinstance(stored, dict):
        raise InputError(f"{file} is not a file of this benchmark; give another --json")
    return stored


def main() -> None:
    """Measure a part, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*TIMED, "counts", "page"])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's)")
    parser.add_argument("--model", choices=list(PAPER), default="resnet18")
    parser.add_argument("--width", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--compile", action="store_true", help="our networks")
    parser.add_argument("--cuda-graph", action="store_true", help="our attacks, on a GPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {name: value for name, value in vars(options).items() if name in Setup.__dataclass_fields__}
    setup = Setup(**given)
    if setup.cuda_graph and setup.device.type != "cuda":
        raise InputError("--cuda-graph needs a GPU, and torch sees none here; leave it out")
    if options.part == "page":
        page(options.json)
        return
    check_output(str(options.json))
    if options.part == "counts":
        counts(setup, options.json)
    else:
        timed(options.part, setup, options.json, rounds=options.rounds, minutes=options.minutes)
        page(options.json)


if __name__ == "__main__":
    raise SystemExit(told(main))
