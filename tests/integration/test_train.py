"""Training on Ray learns what there is to learn; that a resumed run equals the whole one is in test_faults.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def test_training_learns_the_planted_signal(synthetic: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, data = synthetic
    result = train(with_train(run, epochs=3, patience=2), data, tmp_path / "run", resume=False, show=quietly)
    assert result["test"]["auc"] > 0.6
    assert result["test"]["ne"] < 1.0
    assert np.isfinite(result["samples_per_s"])
