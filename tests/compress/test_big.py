"""What large tables and artifacts need: scoring without the tables in memory, ranking, records of written files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import World, random_rows

from compress import evaluate, model, verified
from compress.artifact import load_artifact
from compress.compressor import data_of
from compress.evaluate import score_checkpoint
from compress.methods.codebook import metric_root, nearest
from compress.methods.prune import order_by_score
from compress.model import score_split
from compress.verified import cache_folder, checksum, written_checksum
from trainer.checkpoint import Checkpoint


@pytest.mark.parametrize("kind", ["world", "two_tasks"])
def test_streamed_scores_are_those_of_whole_tables(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: World = request.getfixturevalue(kind)
    for module in (model, evaluate):
        monkeypatch.setattr(module, "SCORE_ROWS", 64)
    monkeypatch.setattr(evaluate, "CHUNK_BATCHES", 2)
    dataset = data_of(world.checkpoint, world.dataset)
    labels, logits = score_checkpoint(world.checkpoint, dataset, "val")
    expected_labels, expected = score_split(world.fp32, dataset, "val")
    assert len(logits) == dataset.rows("val") > 128
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_array_equal(logits, expected)


def test_evaluating_a_checkpoint_reads_no_whole_table(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}
    table_rows = Checkpoint.table_rows

    def watched(self: Checkpoint, table: str, rows: np.ndarray) -> torch.Tensor:
        asked[table] = max(asked.get(table, 0), len(rows))
        return table_rows(self, table, rows)

    def refused(self: Checkpoint, table: str) -> None:
        raise AssertionError(f"{table} is read whole")

    monkeypatch.setattr(Checkpoint, "table_rows", watched)
    monkeypatch.setattr(Checkpoint, "table_chunks", refused)
    monkeypatch.setattr(evaluate, "SCORE_ROWS", 64)
    monkeypatch.setattr(evaluate, "CHUNK_BATCHES", 1)
    told = evaluate.evaluate(world.checkpoint, world.dataset, "val")
    assert told["rows"] == world.dataset.rows("val")
    assert asked["user_id"] <= 64 + 2 < world.dataset.transform.tables["user_id"].num_embeddings


def test_chosen_rows_are_those_of_the_whole(world: World) -> None:
    whole = torch.cat([rows for _, rows in world.checkpoint.table_chunks("user_id")])
    for rows in (np.array([0, 5, len(whole) - 1]), np.arange(len(whole), dtype=np.int32), np.zeros(0, dtype=np.int64)):
        assert torch.equal(world.checkpoint.table_rows("user_id", rows), whole[torch.from_numpy(rows).long()])


# -- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [3, 10_000])
def test_rows_are_ordered_by_score_then_count_then_row(kinds: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=kinds).astype(np.float32)[rng.integers(0, kinds, 5000)]
    scores[10:20], scores[20:30], scores[30], scores[31] = 0.0, -0.0, np.inf, -np.inf
    counts = rng.integers(0, 4, 5000)
    order = order_by_score(scores, counts)
    expected = np.lexsort((-counts[2:], -scores[2:])) + 2
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, [0, 1, *expected])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_centroid_is_nearest_as_the_loss_minds(offset: float) -> None:
    rows, centroids = random_rows(5000, 8, seed=1), random_rows(16, 8, seed=2)
    half = np.random.default_rng(3).normal(size=(8, 8))
    root = metric_root(half @ half.T, 8)
    found = nearest(rows + offset, centroids + offset, root)
    far = torch.cdist((rows + offset).double() @ root.double(), (centroids + offset).double() @ root.double())
    lost = far[torch.arange(len(rows)), torch.from_numpy(found).long()] - far.amin(1)
    assert len(np.unique(found)) > 4
    assert float((lost / far.amin(1)).max()) < 1e-3


# -- what a writer leaves for the next load --------------------------------------------------------------------------


def test_large_files_are_not_hashed_where_they_were_written(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED_S", 0.05)
    monkeypatch.setattr(verified, "LARGE_BYTES", 0)
    world.compress(world.uniform(8), tmp_path / "artifact")
    hashed = []
    digest = verified.hashlib.file_digest
    monkeypatch.setattr(verified.hashlib, "file_digest", lambda *a: (hashed.append(a), digest(*a))[1])
    load_artifact(tmp_path / "artifact")
    assert not hashed
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "elsewhere"))
    artifact = load_artifact(tmp_path / "artifact")
    assert len(hashed) == len(artifact.manifest["files"])


def test_small_files_are_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified.time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    path = tmp_path / "file"
    path.write_bytes(b"now")
    assert written_checksum(path) == checksum(path, full=True)
    assert not cache_folder().exists()
