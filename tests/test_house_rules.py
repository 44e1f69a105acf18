"""What tools check: lint, format, types, import directions, spelling; part of the tests, so one command says it all."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy", "src"],
    "import directions": ["lint-imports"],
    "spelling": ["codespell", "src", "tests", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_tool_finds_nothing(check: str) -> None:
    command = [str(Path(sys.executable).with_name(CHECKS[check][0])), *CHECKS[check][1:]]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr


def test_tracked_files_name_no_absolute_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    texts = [ROOT / name for name in listed.stdout.split() if not name.endswith(".png")]
    roots = [f"/{name}/" for name in ("work", "root", "home", "Users")]

    found = [str(file) for file in texts for root in roots if file.exists() and root in file.read_text()]

    assert found == []
