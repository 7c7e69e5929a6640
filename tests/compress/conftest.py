"""Fixtures of the compress tests: one small world a session (see compress_builders.py)."""

from __future__ import annotations

import pytest
from compress_builders import World, artifact_in, mixed_plan, two_tasks_in, world_in
from tune_builders import ready_in, two_tasks_ready_in

from compress.artifact import Artifact
from compress.config import CompressionPlan
from compress.search.preparation import Preparation


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """3000 rows, one task, a catalogue."""
    return world_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> World:
    """900 rows, two tasks, DLRM, no catalogue."""
    return two_tasks_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def plan() -> CompressionPlan:
    """Bits and cuts of every kind."""
    return mixed_plan()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of `plan`; tests that damage it copy it first."""
    return artifact_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """A search of the large world, prepared."""
    return ready_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def two_tasks_ready(tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    """A search of the world with two tasks, prepared."""
    return two_tasks_ready_in(tmp_path_factory.getbasetemp())
