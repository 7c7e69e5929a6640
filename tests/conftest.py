"""What all tests share. Unit tests start no Ray; integration tests share the one Ray below."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SLIMRANK_CACHE"] = tempfile.mkdtemp(prefix="slimrank-cache-")  # records of tests stay out of the user's

from cluster.session import ALWAYS, QUIET, quiet

# minutes each: begun first, the longest of all before the others, so that two processes end together
LONG = (
    "test_recipes",
    "test_demo",
    "test_tune",
    "test_faults",
    "test_serve_versions",
    "test_criteo",
    "test_serve_load",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/integration is marked so and runs after the unit tests, the longest first."""
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)
    place = {name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: ("integration" in item.path.parts, place.get(item.path.stem, len(LONG))))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray of our own for all integration tests, in a temp folder of its own."""
    import ray

    quiet()
    os.environ.update(ALWAYS | QUIET)
    folder = tempfile.mkdtemp(prefix="slimrank-ray-", dir="/tmp")  # socket paths have a limit: keep it short
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that may not be redistributed; skips where there is none."""
    folder = os.environ.get("SLIMRANK_TEST_DATA")
    if not folder:
        pytest.skip("SLIMRANK_TEST_DATA is not set: no folder with criteo_head.parquet")
    return Path(folder)
