"""Fixtures of the hostile tests: an artifact to damage, and the ways to make a folder look right again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from compress_builders import artifact_in  # noqa: E402

from compress.artifact import Artifact  # noqa: E402


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact with bits and cuts of every kind; tests copy it first."""
    return artifact_in(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "artifact"))
