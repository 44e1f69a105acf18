"""What is tried to break a run, and what comes of it: every slow fault test, as one table.

    python benchmarks/faults.py --json results/faults.json

Minutes for each of them on two cores; those whose counts the JSON file has already are not run again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from told import told

from toughen.cli.files import check_output, write
from toughen.engine.provenance import provenance
from toughen.errors import InputError

ROOT = Path(__file__).parents[1]
COUNTS = re.compile(
    r"^\.?(?P<what>.+?): .*?tried (?P<tried>[\d,]+), .*lost (?P<lost>\d+), tracebacks (?P<tracebacks>\d+)"
)
NUMBER = {kind: re.compile(rf"\b{kind} ([\d,]+)") for kind in ("survived", "refused in one line")}


def tests() -> list[str]:
    """The files of the fault tests."""
    return [f"tests/slow/{file.name}" for file in sorted((ROOT / "tests" / "slow").glob("test_*.py"))]


def counts(file: str) -> list[dict[str, Any]]:
    """Run the slow tests of a file, and read the counts that they print.

    Raises:
        InputError: A test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slow", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise InputError(f"{' '.join(command[1:])} failed; its last words: {done.stdout[-1500:]}")
    rows = []
    for line in done.stdout.splitlines():
        if (found := COUNTS.match(line)) is not None:
            row: dict[str, Any] = {"what": found["what"], "tried": number(found["tried"])}
            for kind, pattern in NUMBER.items():
                row[kind] = number(match[1]) if (match := pattern.search(line)) else 0
            rows.append({**row, "lost": number(found["lost"]), "tracebacks": number(found["tracebacks"])})
    return rows


def number(text: str) -> int:
    """Read a whole number, with or without commas."""
    return int(text.replace(",", ""))


def main() -> None:
    """Run what is missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_output(None if options.json is None else str(options.json))
    kept = options.json.read_text() if options.json is not None and options.json.exists() else "{}"
    found: dict[str, Any] = json.loads(kept)
    found.setdefault("provenance", provenance(seed=0, device=torch.device("cpu"), precision="32-true"))
    files = found.setdefault("files", {})
    for file in tests():
        if file not in files:
            started = time.monotonic()
            print(f"{file} ...", file=sys.stderr)
            files[file] = {"rows": counts(file), "seconds": round(time.monotonic() - started)}
            if options.json is not None:
                write(str(options.json), json.dumps(found, indent=1))
    table = Table()
    columns = ("what", "tried", "survived", "refused in one line", "lost", "tracebacks")
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for tested in files.values():
        for row in tested["rows"]:
            table.add_row(*(str(row[column]) for column in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(told(main))
