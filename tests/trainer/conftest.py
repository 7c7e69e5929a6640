"""What all unit tests of the trainer share: no Ray, and a process group of one where TorchRec wants a group."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # trainer_builders, under any of pytest's import modes


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests start no Ray: a call that would is a failure."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test of the trainer started Ray")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A gloo process group of this process alone, gone after the test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
