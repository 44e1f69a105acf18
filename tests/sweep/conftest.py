"""Ray for the tests of a module: begun once, since that takes seconds."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "toughen[ray]"')
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, object_store_memory=80_000_000, **quiet)
        yield
        ray.shutdown()
