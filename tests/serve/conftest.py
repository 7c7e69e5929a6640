"""Fixtures of the serve tests: a ranker on the artifact that the compress tests use too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from bare_server import bare_server  # noqa: E402
from compress_builders import World, artifact_in, two_tasks_in, world_in  # noqa: E402

from compress.artifact import Artifact  # noqa: E402
from serve.ranker import Ranker  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """3000 rows, one task, a catalogue."""
    return world_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its artifact, with bits and cuts of every kind."""
    return artifact_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def ranker(artifact: Artifact) -> Ranker:
    """A ranker on it."""
    return Ranker(artifact)


@pytest.fixture(scope="session")
def two_task_ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    """A ranker of two tasks, without a catalogue."""
    world = two_tasks_in(tmp_path_factory.getbasetemp())
    return Ranker(world.artifact(world.uniform(8)))


@pytest.fixture(scope="session")
def server(ranker: Ranker) -> Iterator[str]:
    """The URL of its API on bare uvicorn."""
    with bare_server(ranker) as url:
        yield url


@pytest.fixture(scope="session")
def two_task_server(two_task_ranker: Ranker) -> Iterator[str]:
    """The same of two tasks, ordered by a formula."""
    with bare_server(Ranker(two_task_ranker.artifact, "click + 10 * buy")) as url:
        yield url
