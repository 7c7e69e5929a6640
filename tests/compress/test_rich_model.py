"""Attention and weighted bags through compression: one lookup, the scores of the trained module, sealed and opened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compress_builders import World
from rich_builders import rich_world_in

from compress.artifact import GOLDEN_TOLERANCE, check_golden, load_artifact
from compress.compressor import resolve
from compress.config import CompressionPlan, TablePlan
from compress.model import score_split, translate_rows
from compress.search.working_set import extract, score
from trainer.data.batch import Batch, to_batch
from trainer.data.reader import read_split
from trainer.models import build_ranker
from trainer.models.ranker import Ranker

ARCHS = ("dcn", "deepfm", "dlrm", "mmoe")
PRUNED = CompressionPlan(default=TablePlan(bits=8), tables={"item_id": TablePlan(bits=4, keep=0.5)})


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory) -> World:
    return rich_world_in(tmp_path_factory.getbasetemp(), "dcn")


def trained(world: World) -> Ranker:
    """The module that training saved: torchrec's own collection and the head."""
    ranker = build_ranker(world.run.model, world.dataset.transform, device="cpu")
    state = {f"head.{k}": v for k, v in world.checkpoint.dense_state().items()}
    for name in world.dataset.transform.tables:
        state[f"embeddings.embedding_bags.t_{name}.weight"] = world.checkpoint.read(f"tables/{name}/weight")
    ranker.load_state_dict(state)
    return ranker.eval()


def batch_of(world: World) -> Batch:
    return to_batch(read_split(world.dataset, "val").encoded)


@pytest.mark.parametrize("arch", ARCHS)
def test_fp32_model_scores_as_the_trained_module(tmp_path_factory: pytest.TempPathFactory, arch: str) -> None:
    world = rich_world_in(tmp_path_factory.getbasetemp(), arch)
    ranker, batch = trained(world), batch_of(world)
    with torch.no_grad():
        logits, looked_up = ranker(batch)
    torch.testing.assert_close(world.fp32.lookup(batch.sparse), looked_up, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.01
    np.testing.assert_allclose(world.fp32.logits(batch), logits.numpy(), rtol=1e-5, atol=1e-5)


def test_lookup_equals_its_oracle_and_the_trained_collection(rich: World) -> None:
    """Feature by feature: positions of the attention, weighted means and sums on one table."""
    batch = batch_of(rich)
    assert batch.sparse.weights_or_none() is not None
    with torch.no_grad():
        found = trained(rich).embeddings(batch.sparse)
    expected = torch.cat([found[name] for name in rich.fp32.lookup.names], dim=1)
    assert rich.fp32.lookup.names[1:6] == ["item_id", "seen@0", "seen@1", "seen@2", "seen@3"]
    torch.testing.assert_close(rich.fp32.lookup(batch.sparse), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rich.fp32.lookup.oracle(batch.sparse), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_lookup_equals_its_oracle(rich: World, bits: int) -> None:
    artifact = rich.artifact(rich.uniform(bits))
    encoded = read_split(rich.dataset, "val").encoded
    batch = to_batch(translate_rows(artifact.model, rich.dataset, encoded))
    np.testing.assert_allclose(artifact.model.oracle_logits(batch), artifact.model.logits(batch), rtol=1e-4, atol=1e-4)


def test_int8_artifact_opens_with_its_golden_rows(rich: World) -> None:
    artifact = rich.artifact(CompressionPlan(default=TablePlan(bits=8)))
    again = load_artifact(artifact.folder)
    check_golden(again)
    labels, found = score_split(again.model, rich.dataset, "val")
    _, expected = score_split(rich.fp32, rich.dataset, "val")
    assert 0 < np.abs(found - expected).max() < 0.2 * expected.std()
    raw = rich.dataset.sample()
    scores = again.model.score_encoded(again.model.transform.encode(raw))
    np.testing.assert_allclose(scores[:, 0], found[: len(raw), 0], atol=GOLDEN_TOLERANCE)
    assert len(labels) == len(found)


def test_pruned_artifact_scores_raw_rows_as_prepared_ones(rich: World) -> None:
    """Sequences and weighted bags read the centroid too; padding stays absent."""
    artifact = rich.artifact(PRUNED)
    raw = rich.dataset.sample()
    scores = artifact.model.score_encoded(artifact.model.transform.encode(raw))
    _, found = score_split(artifact.model, rich.dataset, "val")
    np.testing.assert_allclose(scores[:, 0], found[: len(raw), 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [None, PRUNED], ids=["fp32", "pruned"])
def test_trials_score_as_the_artifact_would(rich: World, plan: CompressionPlan | None) -> None:
    rows = read_split(rich.dataset, "val")
    working = extract(rich.checkpoint, rich.dataset.transform, rich.profiles, rows)
    resolved = None if plan is None else resolve(plan, rich.profiles)
    found = score(working, resolved)
    model = rich.fp32 if plan is None else rich.artifact(plan).model
    _, expected = score_split(model, rich.dataset, "val")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_catalogue_holds_weights(rich: World) -> None:
    """Item-side bags in the catalogue are the log's own, weights included."""
    artifact = rich.artifact(CompressionPlan(default=TablePlan(bits=8)))
    assert artifact.catalogue is not None
    stored = artifact.catalogue.sparse["words"]
    assert stored.weights is not None
    row = {i: artifact.catalogue.ids.index(i) for i in ("i3", "i9", "i0")}
    assert stored.take(np.array([row["i3"]])).weights.tolist() == [21 % 9 / 4, 24 % 9 / 4, 27 % 9 / 4]  # type: ignore[union-attr]
    assert len(stored.take(np.array([row["i9"]])).values) == 3, "cut at max_length"
    assert stored.take(np.array([row["i0"]])).weights.tolist() == [1.0], "an empty bag reads the missing row"  # type: ignore[union-attr]
