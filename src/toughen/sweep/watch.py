"""What a person sees of a sweep: a live table in a terminal, plain lines elsewhere, from the logs of the runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from toughen.engine.progress import epoch_line
from toughen.errors import InputError
from toughen.sweep.grid import Sweep
from toughen.sweep.store import Progress

_Rows = list[tuple[str, dict[str, Any]]]

console = Console(stderr=True)
_ORDER = ("running", "failed", "stopped", "waiting", "finished")  # where a terminal is too low for all


def plan_table(sweep: Sweep) -> Table:
    """Return the runs of a sweep, a row for those that differ in their seed alone, and what each sets."""
    rows: dict[str, list[int]] = {}
    changes = {run.name.rpartition("/")[0]: run.changes for run in sweep.runs}
    for run in sweep.runs:
        rows.setdefault(run.name.rpartition("/")[0], []).append(run.seed)
    keys = [
        key
        for key in dict.fromkeys(key for changed in changes.values() for key in changed)
        if len({str(changed.get(key)) for changed in changes.values()}) > 1
    ]
    table = Table(title=f"sweep {sweep.name}: {len(sweep.runs)} runs", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for key in ("seeds", "epochs", *keys):
        table.add_column(escape(key), overflow="fold")
    epochs = {run.name.rpartition("/")[0]: run.epochs for run in sweep.runs}
    for row, seeds in rows.items():
        cells = ["-" if key not in changes[row] else _short(changes[row][key]) for key in keys]
        table.add_row(*map(escape, (row, ", ".join(map(str, seeds)), str(epochs[row]), *cells)))
    return table


@dataclass
class _Seen:
    """What is known of a run: its log with those of its branches, and since when this process watches it."""

    rows: _Rows
    state: str
    began: float
    rows_before: int


class Watch:
    """Follows the runs of a sweep by their folders; a context, since a live table has to be taken down."""

    def __init__(self, runs: Sequence[Progress]) -> None:
        self._runs = runs
        now = time.monotonic()
        rows = [_rows(one, known=[]) for one in runs]
        self._seen = [_Seen(found, one.state, now, len(found)) for one, found in zip(runs, rows, strict=True)]
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Watch":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Tell something in a line, above the table."""
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def look(self) -> None:
        """Read what the runs have written since the last look, and show it."""
        for one, seen in zip(self._runs, self._seen, strict=True):
            if one.state != seen.state:
                if one.state == "running":
                    seen.began, seen.rows_before = time.monotonic(), len(seen.rows)
                self._read(one, seen)
                if self._live is None and one.state != "waiting":
                    self.say(f"{one.run.name}: {one.state}" + (f": {one.message}" if one.message else ""))
                seen.state = one.state
            elif one.state == "running":
                self._read(one, seen)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _read(self, one: Progress, seen: _Seen) -> None:
        rows = _rows(one, known=seen.rows)
        if self._live is None:
            for member, row in rows[len(seen.rows) :]:
                self.say(epoch_line(f"{one.run.name}{member}", row))
        seen.rows = rows

    def _table(self) -> Table:
        counts = {state: sum(one.state == state for one in self._runs) for state in _ORDER}
        caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
        table.add_column("run", no_wrap=True)
        for title in ("state", "epoch", "clean", "robust", "left"):
            table.add_column(title, justify="left" if title == "state" else "right")
        both = sorted(zip(self._runs, self._seen, strict=True), key=lambda pair: _ORDER.index(pair[0].state))
        room = max(4, console.size.height - 6)
        for one, seen in both[:room]:
            measured = next((row["validation"] for _, row in reversed(seen.rows) if "validation" in row), None)
            accuracies = ["", ""] if measured is None else [f"{100 * measured[key]:.1f}" for key in ("clean", "robust")]
            epoch = f"{min(len(seen.rows), one.run.epochs)}/{one.run.epochs}"
            table.add_row(escape(one.run.name), one.state, epoch, *accuracies, _left(one, seen))
        if len(both) > room:
            table.add_row(f"and {len(both) - room} more")
        return table


def _rows(one: Progress, *, known: _Rows) -> _Rows:
    """The log of a run and of its branches, one after another, each with the name of its branch."""
    branches = [(f"/{name}", one.folder.branch(name)) for name in one.run.recipe.branches]
    try:
        return [(name, row) for name, member in [("", one.folder), *branches] for row in member.log()]
    except InputError:  # damaged, or replaced this moment on a network's file system: no reason to stop the other runs
        return known


def _left(one: Progress, seen: _Seen) -> str:
    """Minutes and seconds that a run still takes, as fast as it was since it began here."""
    done = len(seen.rows) - seen.rows_before
    if one.state != "running" or done < 1:
        return ""
    seconds = (time.monotonic() - seen.began) / done * max(0, one.run.epochs - len(seen.rows))
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _short(value: Any) -> str:
    """A value as a recipe would have it in one line."""
    if isinstance(value, list) and value and all(isinstance(member, dict) and "name" in member for member in value):
        return " + ".join(_method(member) for member in value)
    return str(value)


def _method(member: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in member.items() if key != "name")
    return f"{member['name']}({settings})" if settings else str(member["name"])
