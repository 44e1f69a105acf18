"""Fixtures for tests of every package."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# one thread per test process: several processes share the cores, and tiny tensors gain nothing from a second
torch.set_num_threads(1)

# no test is timed, since machines are busy or slow; continuous integration draws the same examples every time
settings.register_profile(
    "toughen", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("toughen")

# The networks of the tests are tiny: a second thread costs more than it brings, and much more where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def cifar10_path() -> Path:
    """The folder with CIFAR-10's parquet files, or a skip that says where it was looked for."""
    beside_checkout = Path(__file__).parents[1] / "../shared/data/cifar10"
    path = Path(os.environ.get("TOUGHEN_CIFAR10", beside_checkout)).resolve()
    if not any(path.glob("train-*.parquet")):
        pytest.skip(f"no CIFAR-10 in {path}; set TOUGHEN_CIFAR10 to a folder with its parquet files")
    return path
