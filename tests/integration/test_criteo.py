"""A real ad log through the YAML alone, against a logistic regression that this test tunes on validation itself.

The log may not be redistributed: it is read from the folder named by SLIMRANK_TEST_DATA.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from cluster.cli import main
from compress.model import model_of_checkpoint, score_split
from trainer.checkpoint import open_checkpoint
from trainer.data.dataset import open_dataset

CONFIG = Path(__file__).parents[2] / "configs" / "criteo.yaml"
TRAIN, VAL = 48_000, 56_000


def command(*arguments: object) -> dict:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def criteo(ray_local: None, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    folder = tmp_path_factory.mktemp("criteo")
    log = test_data / "criteo_head.parquet"
    prepared = command("data", "prepare", "--config", CONFIG, "--input", log, "--out", folder / "prepared")
    assert prepared["rows"] == {"train": 48_000, "val": 8_000, "test": 8_000}
    data = folder / "prepared"
    trained = command("train", "--config", CONFIG, "--data", data, "--out", folder / "train")
    tuned = command("tune", "--checkpoint", folder / "train", "--data", data, "--out", folder / "tune", "--trials", 12)
    return folder, trained, tuned


def logistic_regression(log: pd.DataFrame) -> np.ndarray:
    """Test scores of a one-hot logistic regression: rare ids merged, counts in quantile buckets, C by validation."""
    columns = []
    for name in log.columns.drop("label"):
        values = log[name]
        if name.startswith("I"):
            edges = np.unique(values[:TRAIN].dropna().quantile(np.linspace(0, 1, 33)[1:-1]))
            columns.append(
                np.where(values.isna(), -1, np.searchsorted(edges, values.fillna(0).to_numpy(float))).astype(int)
            )
        else:
            counts = values[:TRAIN].value_counts()
            columns.append(np.where(values.map(counts).fillna(0) >= 2, values, -2).astype(int))
    design = sparse.csr_matrix(
        OneHotEncoder(handle_unknown="ignore").fit(np.stack(columns, 1)[:TRAIN]).transform(np.stack(columns, 1))
    )
    labels = log["label"].to_numpy()
    best = None
    for strength in (0.03, 0.1, 0.3):
        model = LogisticRegression(C=strength, solver="liblinear").fit(design[:TRAIN], labels[:TRAIN])
        loss = log_loss(labels[TRAIN:VAL], model.predict_proba(design[TRAIN:VAL])[:, 1])
        if best is None or loss < best[0]:
            best = loss, model.predict_proba(design[VAL:])[:, 1]
    assert best is not None
    return best[1]


def test_criteo_is_not_worse_than_tuned_logistic_regression(criteo: tuple[Path, dict, dict], test_data: Path) -> None:
    folder, trained, _ = criteo
    peer = logistic_regression(pd.read_parquet(test_data / "criteo_head.parquet"))
    dataset = open_dataset(folder / "prepared")
    model = model_of_checkpoint(open_checkpoint(folder / "train"), dataset.transform)
    labels, logits = (a[:, 0] for a in score_split(model, dataset, "test"))
    assert roc_auc_score(labels, peer) > 0.76  # the peer is a real one: about .769
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(300):
        rows = rng.integers(0, len(labels), len(labels))
        gaps.append(roc_auc_score(labels[rows], logits[rows]) - roc_auc_score(labels[rows], peer[rows]))
    assert np.quantile(gaps, 0.95) >= 0, f"worse beyond the paired bound: {np.mean(gaps):+.4f}"
    assert trained["test"]["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)


def test_criteo_artifact_is_small_and_as_good(criteo: tuple[Path, dict, dict]) -> None:
    folder, trained, tuned = criteo
    small = command("evaluate", "--model", tuned["artifact"], "--data", folder / "prepared", "--split", "test")
    assert abs(small["auc"] - trained["test"]["auc"]) <= 0.002
    chosen = tuned["front"][tuned["chosen"]]
    assert chosen["table_bytes"] < tuned["table_bytes_fp32"] / 2
