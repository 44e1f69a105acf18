"""What a person sees while a run goes on: a bar with the time left in a terminal, plain lines elsewhere. On stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)


class EpochProgress:
    """Counts steps over all epochs of a run; says one line per epoch where there is no terminal."""

    def __init__(self, bar: Progress | None, *, total: int, done: int = 0, silent: bool = False) -> None:
        self._bar, self._silent = bar, silent
        self._task = None if bar is None else bar.add_task("training", total=total, completed=done, status="")

    def at(self, step: int) -> None:
        """Set the number of steps done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def say(self, line: str, *, status: str) -> None:
        """Tell how the last epoch went: in a few words behind the bar, or in a line where there is no bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status=status)
        elif not self._silent:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def epoch_progress(
    title: str, *, total: int, done: int, images_per_step: int, show: bool, silent: bool = False
) -> Iterator[EpochProgress]:
    """Show the progress of a run inside the ``with``.

    Args:
        title: What runs.
        total: Steps of the run.
        done: Steps that were done before.
        images_per_step: Of all processes.
        show: Whether to draw a bar where there is a terminal; a pipe and a notebook have lines.
        silent: Whether to show nothing at all.
    """
    if silent or not (show and console.is_terminal):
        yield EpochProgress(None, total=total, silent=silent)
        return
    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _ImagesPerSecond(images_per_step),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield EpochProgress(bar, total=total, done=done)


class _ImagesPerSecond(ProgressColumn):
    def __init__(self, per_step: int) -> None:
        super().__init__()
        self._per_step = per_step

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed * self._per_step:.0f} images/s")


@contextmanager
def attack_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that is told the attack, the samples done and those to do; it draws bars in a terminal."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(attack: str, done: int, total: int) -> None:
            if attack not in tasks:
                tasks[attack] = bar.add_task(attack, total=total)
            bar.update(tasks[attack], completed=done, total=total)

        yield tell


def epoch_status(log: list[dict[str, Any]]) -> str:
    """Say the newest validation in a few words."""
    measured = [row["validation"] for row in log if "validation" in row][-1:]
    return " ".join(f"clean {100 * m['clean']:.1f} robust {100 * m['robust']:.1f}" for m in measured)


def epoch_line(run: str, row: dict[str, Any]) -> str:
    """Say how one epoch of a run (or branch) went, in one line."""
    parts = [
        f"{run}: epoch {row['epoch']:>3}",
        row["method"],
        f"loss {row['losses']['loss']:.3f}",
        f"lr {row['lr']:.4f}",
    ]
    if "validation" in row:
        measured = row["validation"]
        parts.append(f"validation clean {measured['clean']:.3f} robust {measured['robust']:.3f} (n={measured['n']})")
    return "  ".join([*parts, f"{row['images_per_second']:.0f} images/s", f"{row['seconds']:.1f} s"])
