"""Files of sweeps for tests, of runs of about a second."""

from pathlib import Path
from typing import Any

import yaml

from small_runs import document

GRID: dict[str, Any] = {"method": [[{"name": "pgd-at"}], [{"name": "trades"}]]}


def write(folder: Path, **keys: Any) -> Path:
    """The file of a sweep over the small recipe, with keys changed."""
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"recipe": document(), **keys}, sort_keys=False))
    return file
