"""What must be known to repeat a run: command, commit, versions, hardware."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

PACKAGES = (
    "toughen",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "lightning-fabric",
    "safetensors",
    "scikit-learn",
    "pillow",
    "pyarrow",
)


def provenance(*, seed: int, device: torch.device, precision: str) -> dict[str, Any]:
    """Describe this process and machine as plain values. Paths are in it only if the command has them."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "seed": seed,
        "device": _device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    """The commit of this package, from what its installer wrote down (PEP 610); None for a release from an index.

    For an installation from a local checkout it is the checkout's commit as it is now, with a mark if files changed;
    None where another copy of the package runs than the one installed.
    """
    origin = json.loads(distribution("toughen").read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])
    if "dir_info" not in origin:
        return None
    checkout = url2pathname(urlsplit(origin["url"]).path)
    if origin["dir_info"].get("editable") and not Path(__file__).resolve().is_relative_to(Path(checkout).resolve()):
        return None  # Python's path leads to another copy than the installed one
    git = ["git", "-C", checkout]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-changed" if status.stdout.strip() else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
