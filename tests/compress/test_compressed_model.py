"""compress/model.py and compress/evaluate.py: one scoring path, and rows translated between training and artifact."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import World, build_world, extended_world, mixed_plan, prepare_here

import compress.model
from compress.artifact import Artifact
from compress.config import CompressionPlan, TablePlan
from compress.evaluate import evaluate, open_model
from compress.model import check_same_transform, model_of_checkpoint, score_split, translate_rows, translation
from trainer.config import MetricsConfig
from trainer.data.batch import to_batch
from trainer.data.reader import read_split
from trainer.data.transform import RESERVED_ROWS, IdMap
from trainer.errors import CheckpointError, DataError, SlimrankError
from trainer.metrics import grouped_auc, task_metrics
from trainer.models import build_ranker

CENTROID = RESERVED_ROWS  # the row that cut ids read where there is one centroid


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory, world: World) -> World:
    """The same log prepared with rarer ids kept: other vocabularies, the same numbers."""
    other = build_world(tmp_path_factory.mktemp("later"), rows=3000, seed=0)
    rarer = other.run.model_copy(update={"data": other.run.data.model_copy(update={"min_count": 1})})
    dataset = prepare_here(rarer, other.raw, other.folder / "prepared-rarer")
    assert dataset.transform.tables["user_id"].num_embeddings > 182
    return dataclasses.replace(other, dataset=dataset)


# -- the fp32 model --------------------------------------------------------------------------------------------------


def test_fp32_model_scores_as_the_trained_module(world: World) -> None:
    """Against torchrec's own EmbeddingBagCollection with the checkpoint's weights, not by way of the TBE."""
    ranker = build_ranker(world.run.model, world.dataset.transform, device="cpu")
    state = {f"head.{k}": v for k, v in world.checkpoint.dense_state().items()}
    for name in world.dataset.transform.tables:
        state[f"embeddings.embedding_bags.t_{name}.weight"] = world.checkpoint.read(f"tables/{name}/weight")
    ranker.load_state_dict(state)
    ranker.eval()
    rows = read_split(world.dataset, "test")
    batch = to_batch(rows.encoded)
    found = world.fp32.lookup(batch.sparse)
    pooled = ranker.embeddings(batch.sparse)
    at = 0
    for name in world.dataset.transform.sparse:
        dim = world.dataset.transform.table_of(name).embedding_dim
        torch.testing.assert_close(found[:, at : at + dim], pooled[name], rtol=1e-5, atol=1e-6)
        at += dim
    with torch.no_grad():
        logits = ranker(batch)[0].numpy()
    np.testing.assert_allclose(world.fp32.logits(batch), logits, rtol=1e-4, atol=1e-5)


def test_fp32_plan_without_pruning_scores_exactly_as_the_checkpoint(world: World) -> None:
    artifact = world.artifact(CompressionPlan(default=TablePlan(bits=32)))
    labels, found = score_split(artifact.model, world.dataset, "val")
    expected_labels, expected = score_split(world.fp32, world.dataset, "val")
    assert np.array_equal(found, expected)
    assert np.array_equal(labels, expected_labels)
    assert expected.shape == (600, 1)


def test_fp32_model_read_in_chunks_is_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.READ_ROWS", 19)
    chunked = model_of_checkpoint(world.checkpoint, world.dataset.transform)
    assert torch.equal(chunked.lookup.block, world.fp32.lookup.block)


def test_more_bits_come_closer_to_fp32(world: World) -> None:
    _, fp32 = score_split(world.fp32, world.dataset, "val")
    off = []
    for bits in (2, 4, 8, 16):
        _, logits = score_split(world.artifact(world.uniform(bits)).model, world.dataset, "val")
        off.append(float(np.abs(logits - fp32).mean()))
    assert off == sorted(off, reverse=True)
    assert off[0] > 0.02
    assert off[-1] < 1e-3


# -- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_oracle_logits_are_close_to_logits(world: World, artifact: Artifact, split: str) -> None:
    rows = read_split(world.dataset, split)  # type: ignore[arg-type]
    batch = to_batch(translate_rows(artifact.model, world.dataset, rows.encoded))
    logits = artifact.model.logits(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(artifact.model.oracle_logits(batch), logits, rtol=1e-5, atol=1e-5)


def test_oracle_logits_of_two_tasks_are_close_to_logits(two_tasks: World) -> None:
    model = two_tasks.artifact(two_tasks.uniform(4, 0.8)).model
    rows = read_split(two_tasks.dataset, "val")
    batch = to_batch(translate_rows(model, two_tasks.dataset, rows.encoded))
    assert model.logits(batch).shape == (180, 2)
    np.testing.assert_allclose(model.oracle_logits(batch), model.logits(batch), rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_rows_beside_them(
    world: World, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = translate_rows(artifact.model, world.dataset, read_split(world.dataset, "val").encoded)
    whole = artifact.model.score_encoded(encoded)
    monkeypatch.setattr(compress.model, "SCORE_ROWS", 7)
    np.testing.assert_allclose(artifact.model.score_encoded(encoded), whole, rtol=1e-5, atol=1e-6)
    one = artifact.model.score_encoded(encoded.take(np.array([41])))
    np.testing.assert_allclose(one, whole[[41]], rtol=1e-5, atol=1e-6)


# -- translation -----------------------------------------------------------------------------------------------------


def test_translation_of_hash_tables_is_their_remap() -> None:
    trained = IdMap(4)
    assert translation(trained, IdMap(4), 6).tolist() == [0, 1, 2, 3, 4, 5]
    remap = np.array([0, 1, 3, 2, 3, 3], dtype=np.int32)
    assert translation(trained, IdMap(4, remap=remap), 6).tolist() == remap.tolist()


def test_translation_of_a_vocabulary_finds_each_key() -> None:
    trained = IdMap(3, np.array([10, 20, 30], dtype=np.uint64))
    own = IdMap(2, np.array([20, 30], dtype=np.uint64), 0, np.array([0, 1, 3, 2], dtype=np.int32))
    assert translation(trained, own, 5).tolist() == [0, 1, 0, 3, 2]


def test_translation_of_an_extended_vocabulary_goes_by_its_rows() -> None:
    trained = IdMap.of_rows(np.array([20, 30, 10], dtype=np.uint64))
    own = IdMap(2, np.array([20, 30], dtype=np.uint64), 0, np.array([0, 1, 3, 2], dtype=np.int32))
    assert translation(trained, own, 5).tolist() == [0, 1, 3, 2, 0]


def test_prepared_rows_translate_to_what_raw_rows_encode_to(world: World, artifact: Artifact) -> None:
    """Parity: training rows through the row maps, raw values through the artifact's own transform."""
    raw = world.dataset.sample()
    prepared = read_split(world.dataset, "val", limit=len(raw))
    translated = translate_rows(artifact.model, world.dataset, prepared.encoded)
    encoded = artifact.model.transform.encode(raw)
    assert list(translated.sparse) == list(encoded.sparse)
    for name, ragged in encoded.sparse.items():
        assert np.array_equal(translated.sparse[name].values, ragged.values), name
        lengths = translated.sparse[name].lengths
        assert (lengths is None) == (ragged.lengths is None)
        assert lengths is None or np.array_equal(lengths, ragged.lengths)
    assert np.array_equal(translated.dense, encoded.dense)
    assert np.array_equal(artifact.model.score_encoded(translated), artifact.model.score_encoded(encoded))


def test_parity_rows_hold_every_case(world: World, artifact: Artifact) -> None:
    """What makes parity worth something: kept, pruned, unknown and missing values all occur in those rows."""
    encoded = artifact.model.transform.encode(world.dataset.sample())
    assert {t.name for t in artifact.model.lookup.tables if t.centroids} >= {"user_id", "item_id", "city"}
    users = encoded.sparse["user_id"].values
    for kind in (users > CENTROID, users == CENTROID, users == 0):
        assert kind.any()
    for name in ("city", "income", "recent", "genres"):
        assert (encoded.sparse[name].values == 1).any(), name
    assert (encoded.sparse["recent"].values == CENTROID).any()
    bags = encoded.sparse["recent"].lengths
    assert bags is not None
    assert set(bags.tolist()) == {1, 2, 3, 4}  # cut at max_length 4; empty ones hold the missing row


def test_later_data_with_other_vocabularies_is_scored_alike(world: World, artifact: Artifact, later: World) -> None:
    """The same raw rows, prepared with other vocabularies, get the same scores: ids travel by their hash."""
    _, expected = score_split(artifact.model, world.dataset, "test")
    _, found = score_split(artifact.model, later.dataset, "test")
    assert np.array_equal(found, expected)


def test_extended_vocabulary_compresses_and_scores_as_its_checkpoint(world: World, tmp_path: Path) -> None:
    grown = extended_world(world, tmp_path)
    old = world.dataset.transform.tables["user_id"].num_embeddings
    assert grown.dataset.transform.tables["user_id"].num_embeddings > old + 20
    assert grown.dataset.transform.lineage == (world.dataset.transform.fingerprint(),)
    exact = grown.artifact(CompressionPlan(default=TablePlan(bits=32)))
    raw = grown.dataset.sample()
    np.testing.assert_array_equal(
        exact.model.score_encoded(exact.model.transform.encode(raw)),
        grown.fp32.score_encoded(grown.dataset.transform.encode(raw)),
    )
    pruned = grown.artifact(mixed_plan())
    for split in ("val", "test"):
        np.testing.assert_array_equal(
            score_split(exact.model, grown.dataset, split)[1], score_split(grown.fp32, grown.dataset, split)[1]
        )
    prepared = read_split(grown.dataset, "val", limit=len(raw)).encoded
    translated, encoded = translate_rows(pruned.model, grown.dataset, prepared), pruned.model.transform.encode(raw)
    for name, ragged in encoded.sparse.items():
        np.testing.assert_array_equal(translated.sparse[name].values, ragged.values, err_msg=name)


def test_data_encoded_otherwise_is_refused(world: World, two_tasks: World, artifact: Artifact) -> None:
    check_same_transform(artifact.model.transform, world.dataset)
    with pytest.raises(DataError, match=f"{two_tasks.dataset.folder}: not the prepared data"):
        score_split(artifact.model, two_tasks.dataset, "val")


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_tells_rows_and_metrics(world: World, artifact: Artifact) -> None:
    model = open_model(artifact.folder, world.dataset)
    told = evaluate(model, world.dataset, "test")
    labels, logits = score_split(artifact.model, world.dataset, "test")
    groups = read_split(world.dataset, "test").groups
    assert told == {"rows": 300, **task_metrics(labels, logits, ["click"], groups)}
    assert told["gauc"] == grouped_auc(labels[:, 0], logits[:, 0], groups)
    assert 0 < told["gauc"] < 1
    assert {"auc", "ne", "log_loss", "calibration", "ndcg@10", "recall@10", "precision", "f1"} < set(told)


def test_evaluate_counts_as_the_run_of_the_model_says(world: World) -> None:
    model = dataclasses.replace(world.fp32, metrics=MetricsConfig(k=(1, 3), threshold=0.999))
    told = evaluate(model, world.dataset, "test")
    assert {"ndcg@1", "ndcg@3"} < set(told)
    assert "ndcg@10" not in told
    assert told["recall"] < evaluate(world.fp32, world.dataset, "test")["recall"]


def test_evaluate_of_two_tasks_tells_both(two_tasks: World) -> None:
    told = evaluate(two_tasks.fp32, two_tasks.dataset, "test")
    assert set(told) == {"rows", "click", "buy"}
    assert told["click"] != told["buy"]
    assert ("gauc" in told["click"]) == (two_tasks.dataset.groups("test") is not None)
    assert set(told["buy"]) == set(told["click"])


def test_open_model_takes_a_checkpoint(world: World) -> None:
    told = evaluate(open_model(world.checkpoint.folder, world.dataset), world.dataset, "test")
    assert told == evaluate(world.fp32, world.dataset, "test")


def test_open_model_refuses_a_checkpoint_of_other_data(world: World, two_tasks: World) -> None:
    with pytest.raises(DataError, match="trained on"):
        open_model(world.checkpoint.folder, two_tasks.dataset)


def test_open_model_refuses_what_is_neither(world: World, tmp_path: Path) -> None:
    with pytest.raises(SlimrankError, match="neither a checkpoint nor an artifact"):
        open_model(tmp_path, world.dataset)


def test_open_model_refuses_a_damaged_checkpoint(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.checkpoint.folder, tmp_path / "c"))
    path = folder / "dense.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="dense.safetensors"):
        open_model(folder, world.dataset)
