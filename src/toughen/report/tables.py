"""The comparison of runs as a table: what each reached on test images, and what it cost."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.table import Table

from toughen.errors import InputError
from toughen.run_folder import RunFolder


def comparison_table(runs: Iterable[RunFolder]) -> Table:
    """Put runs side by side, each followed by its branches; the last and the best checkpoint of each.

    "Best" is the epoch with the highest robust validation accuracy; test images choose nothing.

    Raises:
        InputError: A run has no evaluation yet, or the runs were evaluated with different attacks or images.
    """
    entries = [entry for run in runs for entry in _family(run)]
    attacks = _common_attacks(entries)
    n = entries[0].last[attacks[0]]["n"]
    title = f"accuracy on {n} test images, percent: last epoch (best on validation)"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("method", min_width=9)
    for column in ("epochs", *attacks, "trained", "s/epoch", "FLOPs"):
        table.add_column(column, justify="right")
    for entry in entries:
        cells = [f"{_percent(entry.last[a])} ({_percent(entry.best[a])})" for a in attacks]
        table.add_row(entry.name, entry.method, str(entry.epochs), *cells, *entry.costs())
    table.caption = (
        f"{_threat(entries[0])}. FLOPs: of one training step, relative to a PGD-AT step of the same attack. "
        f"Standard error of an accuracy: up to {50 / n**0.5:.1f} points."
    )
    return table


class _Entry:
    """One row: a run with its evaluations and the cost of its own epochs (median seconds, mean operations)."""

    def __init__(self, run: RunFolder, name: str, log: list[dict[str, Any]]) -> None:
        self.name = name
        self.config = run.config()
        self.last, self.best = run.evaluations("last"), run.evaluations("best")
        if not self.last or not self.best or not log:
            path = (run.parent_run or run).path
            raise InputError(f"run {run.path} has no evaluation yet; finish it with `toughen train --resume {path}`")
        self.log = log
        self.method = log[-1]["method"]
        self.epochs = max(found["epoch"] for found in self.last.values())  # a run that collapsed went back

    def costs(self) -> tuple[str, str, str]:
        rows = self.log
        seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
        flops = sum(row["gflops_per_image"] / row["pgd_at_gflops_per_image"] for row in rows) / len(rows)
        return f"{100 * rows[-1]['trainable_share']:.1f} %", f"{seconds:.2f}", f"{flops:.2f}"


def _family(run: RunFolder) -> Iterator[_Entry]:
    name = run.path.name or str(run.path)
    yield _Entry(run, name, run.log())
    for branch in run.branches():
        yield _Entry(branch, f"{name}/{branch.path.name}", branch.log())


def _common_attacks(entries: list[_Entry]) -> list[str]:
    """The attacks that every checkpoint has met; refuses runs that are not alike."""
    if not entries:
        raise InputError("nothing to compare: give at least one run folder")
    first = entries[0]
    attacks = [name for name in first.last if all(name in entry.last and name in entry.best for entry in entries)]
    if not attacks:
        raise InputError("the runs have no attack in common; evaluate all with the same `toughen evaluate` call")
    for entry in entries:
        for attack in attacks:
            result, others = first.last[attack], (entry.last[attack], entry.best[attack])
            if any(other["images_sha256"] != result["images_sha256"] for other in others):
                raise InputError(
                    f"{entry.name} and {first.name} were evaluated on different test images "
                    f"(n {others[0]['n']} of {entry.config['data']['name']}, n {result['n']} of "
                    f"{first.config['data']['name']}); compare them apart"
                )
            if any(other["settings"] != result["settings"] for other in others):
                raise InputError(
                    f"{entry.name} and {first.name} were not evaluated alike ({attack}: other threat model or "
                    "settings); evaluate both with the same `toughen evaluate` call"
                )
        if entry.config["threat"] != first.config["threat"]:
            raise InputError(
                f"{entry.name} and {first.name} were trained for different threat models; compare them apart"
            )
    return attacks


def _percent(result: dict[str, Any]) -> str:
    return f"{100 * result['accuracy']:.1f}"


def _threat(entry: _Entry) -> str:
    threat = entry.config["threat"]
    return f"{threat.get('norm', 'linf')}, eps {threat['eps']:.4g}, data {entry.config['data']['name']}"
