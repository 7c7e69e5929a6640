"""Training on Ray: resuming gives the run that was never interrupted, and training learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.config import RunConfig, load_run
from trainer.data.prepare import prepare
from trainer.data.sources.synthetic import write_synthetic
from trainer.ray_train import train

ROWS = 12_000


def quietly(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def synthetic(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder / "log", ROWS, max_ids=300, progress=quietly)
    run = load_run(folder / "log" / "run.yaml")
    prepare(run, folder / "prepared", quietly)
    return run, folder / "prepared"


def with_train(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(
        update={"train": run.train.model_copy(update={"patience": 100, "evals_per_epoch": 1, **changes})}
    )


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {key: checkpoint.read(key) for key in checkpoint.keys()}  # noqa: SIM118


def test_resumed_run_equals_uninterrupted_run(synthetic: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """A dlrm; the dcn is killed and resumed in test_faults.py, on as many workers and on fewer."""
    run, data = synthetic
    run = run.model_copy(update={"model": run.model.model_copy(update={"arch": "dlrm"})})
    whole = train(with_train(run, epochs=2, keep_checkpoints=3), data, tmp_path / "whole", resume=False, show=quietly)
    train(with_train(run, epochs=1, keep_checkpoints=3), data, tmp_path / "parts", resume=False, show=quietly)
    parts = train(with_train(run, epochs=2, keep_checkpoints=3), data, tmp_path / "parts", resume=True, show=quietly)
    assert parts["samples"] == whole["samples"] == 2 * int(ROWS * 0.8)
    last = f"step-{whole['samples']:012d}"
    left, right = open_checkpoint(tmp_path / "whole" / last), open_checkpoint(tmp_path / "parts" / last)
    for key, value in tensors(left).items():
        assert torch.equal(value, right.read(key)), key
    assert parts["val"] == whole["val"]
    assert parts["test"] == whole["test"]


def test_training_learns_the_planted_signal(synthetic: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, data = synthetic
    result = train(with_train(run, epochs=3, patience=2), data, tmp_path / "run", resume=False, show=quietly)
    assert result["test"]["auc"] > 0.6
    assert result["test"]["ne"] < 1.0
    assert np.isfinite(result["samples_per_s"])
