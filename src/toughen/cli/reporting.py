"""The verbs that tell of runs: ``compare`` in tables, ``report`` as a page."""

import argparse
import json
from pathlib import Path
from typing import Any

from toughen.cli.console import out, say
from toughen.cli.files import check_output, write
from toughen.cli.sweeping import expanded
from toughen.durable import read_text
from toughen.errors import InputError
from toughen.report import compare_runs, comparison_tables, report_page


def run_compare(options: argparse.Namespace) -> None:
    """Put runs side by side, in the terminal."""
    check_output(options.json)
    comparison = compare_runs(expanded(options.runs), seeds="each" if options.each else "folded")
    out.print(comparison_tables(comparison))
    if options.json:
        write(options.json, json.dumps(comparison.to_dict()))


def run_report(options: argparse.Namespace) -> None:
    """Write a page about runs."""
    runs = expanded(options.runs)
    file = options.out or str((runs[0].path if len(runs) == 1 else Path()) / "report.html")
    check_output(file, ".html")
    matrices = [matrix for given in options.transfer for matrix in _matrices(Path(given))]
    write(file, report_page(runs, matrices=matrices, seeds="each" if options.each else "folded"))
    say(f"page: {file}")


def _matrices(file: Path) -> list[dict[str, Any]]:
    text = read_text(file)
    try:
        found = list(json.loads(text).values())
        if not all({"attack", "n", "names", "accuracy"} <= set(matrix) for matrix in found):
            raise ValueError
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{file} holds no transfer matrix; give what `toughen transfer --json` wrote") from None
    return found
