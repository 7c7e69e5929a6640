"""compress/search/sensitivity.py: Fisher matrices against autograd id by id, predicted losses against naive sums.

Legend: D embedding dim, E bucket edges.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import World, quiet, two_tasks_in, world_in
from rich_builders import rich_world_in

from compress.compressor import resolve
from compress.config import Clip, CompressionPlan, TablePlan
from compress.methods.codec import dequantize_rows, quantize_rows
from compress.search.profile import profile_tables
from compress.search.sensitivity import Predicted, predict, predict_table, sensitivities
from compress.search.space import packable
from compress.search.working_set import extract, score
from trainer.data.batch import to_batch
from trainer.data.reader import read_split, spread_rows

SAMPLE = 150


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def world_of(base: Path, name: str) -> World:
    """One task with means and a shared table; two tasks; attention and weighted bags."""
    if name == "rich":
        return rich_world_in(base, "dcn")
    return world_in(base) if name == "one task" else two_tasks_in(base)


def naive_fisher(world: World, limit: int) -> dict[str, np.ndarray]:
    """Id by id: every looked-up row of every sample is a leaf of its own, pooled by hand."""
    model, tables = world.fp32, world.fp32.lookup.tables
    weights = {t.name: world.checkpoint.read(f"tables/{t.name}/weight") for t in tables}
    sums = {t.name: np.zeros((t.dim, t.dim)) for t in tables}
    lookups = dict.fromkeys(sums, 0)
    rows = spread_rows(world.dataset, "train", limit)
    for sample in range(len(rows)):
        batch = to_batch(rows.encoded.take(np.array([sample])))
        leaves, pooled = [], []
        for index, name in enumerate(model.lookup.names):
            table = tables[model.lookup.table_of[index]].name
            jagged = batch.sparse[name]
            leaf = weights[table][jagged.values().long()].clone().requires_grad_()
            each = torch.ones(len(leaf)) if jagged.weights_or_none() is None else jagged.weights()
            if model.lookup.mean[index] and jagged.weights_or_none() is None:
                each = each / max(len(leaf), 1)
            leaves.append((table, leaf))
            pooled.append((leaf * each[:, None]).sum(0))
        logits = model.head(batch.dense, torch.cat(pooled)[None])[0]
        for z in logits:
            p = float(torch.sigmoid(z.detach()))
            gradients = torch.autograd.grad(z, [leaf for _, leaf in leaves], retain_graph=True)
            for (table, _), gradient in zip(leaves, gradients, strict=True):
                g = gradient.double().numpy()
                sums[table] += p * (1 - p) * g.T @ g
        for table, leaf in leaves:
            lookups[table] += len(leaf)
    return {name: total / lookups[name] for name, total in sums.items()}


@pytest.mark.parametrize("name", ["one task", "two tasks", "rich"])
def test_sensitivity_is_the_mean_over_lookups_of_outer_gradients(base: Path, name: str) -> None:
    world = world_of(base, name)
    expected = naive_fisher(world, SAMPLE)
    found = sensitivities(world.checkpoint, world.dataset, quiet, SAMPLE)
    assert list(found) == list(expected)
    for table, fisher in found.items():
        scale = np.abs(expected[table]).max()
        assert scale > 0
        np.testing.assert_allclose(fisher, expected[table], rtol=1e-3, atol=1e-4 * scale, err_msg=table)


def test_sensitivity_in_batches_is_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(base, "two tasks")
    whole = sensitivities(world.checkpoint, world.dataset, quiet, SAMPLE)
    monkeypatch.setattr("compress.search.sensitivity.SCORE_ROWS", 37)
    told: list[tuple[str, int, int]] = []
    batched = sensitivities(world.checkpoint, world.dataset, lambda *step: told.append(step), SAMPLE)
    assert told == [("sensitivity", n, SAMPLE) for n in (37, 74, 111, 148, 150)]
    for table, fisher in whole.items():
        np.testing.assert_allclose(batched[table], fisher, rtol=1e-4, atol=1e-5 * np.abs(fisher).max())


# -- predicted losses ------------------------------------------------------------------------------------------------


@functools.cache
def fisher_of(world: World) -> dict[str, np.ndarray]:
    return sensitivities(world.checkpoint, world.dataset, quiet)


def naive_quadratic(errors: np.ndarray, counts: np.ndarray, fisher: np.ndarray) -> float:
    """Sum of n e' F e, one by one."""
    return float(sum(n * e @ fisher @ e for e, n in zip(errors, counts, strict=True)))


@pytest.mark.parametrize("table", ["user_id", "item_id", "genres", "city", "income"])
@pytest.mark.parametrize("clip", ["minmax", "search"])
def test_predicted_loss_of_bits_is_the_naive_sum(world: World, table: str, clip: Clip) -> None:
    """Tables of fewer rows than a bucket's sample: nothing is estimated."""
    profile, fisher, rows = world.profiles[table], fisher_of(world)[table], world.dataset.rows("train")
    found = predict_table(world.checkpoint, profile, fisher, rows, [clip])
    dim = profile.info.embedding_dim
    assert found.bits == {4: (4, 8, 16, 32), 12: (4, 8, 16, 32)}.get(dim, (2, 4, 8, 16, 32))
    assert found.loss.shape == (len(profile.edges) - 1, len(found.bits))
    weight = world.checkpoint.read(f"tables/{table}/weight")[profile.order]
    counts = world.dataset.counts(table)[profile.order]
    for option, bits in enumerate(found.bits):
        errors = (dequantize_rows(quantize_rows(weight, bits, clip), dim, bits) - weight).double().numpy()
        for bucket in range(len(profile.edges) - 1):
            part = slice(profile.edges[bucket], profile.edges[bucket + 1])
            expected = 0.5 / rows * naive_quadratic(errors[part], counts[part], fisher)
            assert found.loss[bucket, option] == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert (np.diff(found.loss.sum(0)) <= 0).all()
    assert found.loss[:, -1].max() == 0


@pytest.mark.parametrize("table", ["user_id", "item_id", "genres", "city", "income"])
@pytest.mark.parametrize("order", ["frequency", "fisher"])
def test_predicted_loss_of_a_cut_is_that_of_reading_the_mean(world: World, table: str, order: str) -> None:
    fisher = fisher_of(world)
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, order, fisher)  # type: ignore[arg-type]
    profile, training = profiles[table], world.dataset.rows("train")
    found = predict_table(world.checkpoint, profile, fisher[table], training)
    rows = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    counts = world.dataset.counts(table)[profile.order].astype(np.float64)
    assert found.cut.shape == found.shared.shape == profile.edges.shape
    assert found.cut[-1] == pytest.approx(0, abs=1e-12)
    for index, edge in enumerate(profile.edges[:-1]):
        tail = rows[profile.order[edge:]]
        expected = naive_quadratic(tail - profile.centroid(int(edge)), counts[edge:], fisher[table])
        assert found.cut[index] == pytest.approx(0.5 / training * expected, rel=1e-3, abs=1e-9)
        both = np.concatenate([tail, rows[:1]]) - profile.fallback(int(edge))
        expected = naive_quadratic(both, np.append(counts[edge:], profile.unknown), fisher[table])
        assert found.shared[index] == pytest.approx(0.5 / training * expected, rel=1e-3, abs=1e-9)
    assert (found.shared >= found.cut - 1e-9).all(), "unknown ids lose too when they share a row"


@pytest.mark.parametrize("table", ["user_id", "item_id", "city"])
@pytest.mark.parametrize("order", ["frequency", "fisher"])
def test_predicted_loss_of_reading_a_centroid_is_the_naive_sum(world: World, table: str, order: str) -> None:
    fisher, training = fisher_of(world), world.dataset.rows("train")
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, order, fisher, (4, 16))  # type: ignore[arg-type]
    profile = profiles[table]
    found = predict_table(world.checkpoint, profile, fisher[table], training)
    assert list(found.nearest) == [4, 16]
    weight = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    counts = world.dataset.counts(table)
    for count, losses in found.nearest.items():
        assert losses.shape == (len(profile.edges) - 1,)
        book = profile.codebooks[count]
        for bucket in range(len(profile.edges) - 1):
            rows = profile.order[profile.edges[bucket] : profile.edges[bucket + 1]]
            errors = book.centroids[book.numbers[rows]] - weight[rows]
            expected = 0.5 / training * naive_quadratic(errors, counts[rows], fisher[table])
            assert losses[bucket] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.nearest[16].sum() < found.nearest[4].sum()


def test_predicted_loss_of_no_codebook_is_none(world: World) -> None:
    assert predict_table(world.checkpoint, world.profiles["city"], fisher_of(world)["city"], 1000).nearest == {}


def test_predicted_loss_from_a_sample_of_a_bucket_is_near_the_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, fisher = world.profiles["user_id"], fisher_of(world)["user_id"]
    whole = predict_table(world.checkpoint, profile, fisher, 1000)
    monkeypatch.setattr("compress.search.sensitivity.BUCKET_ROWS", 2)
    sampled = predict_table(world.checkpoint, profile, fisher, 1000)
    assert not np.array_equal(sampled.loss, whole.loss)
    np.testing.assert_allclose(sampled.loss.sum(0)[:-1], whole.loss.sum(0)[:-1], rtol=0.5)


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(x)) for x in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_predicted_losses_rank_as_measured_ones(world: World) -> None:
    """By table and bits, on validation rows. Labels are the fp32 model's own probabilities: it is their optimum.

    That is where the quadratic holds without a first-order term, so small losses must agree in size too.
    """
    rows = read_split(world.dataset, "val")
    predicted = predict(world.checkpoint, world.profiles, fisher_of(world), world.dataset.rows("train"), quiet)
    working = extract(world.checkpoint, world.dataset.transform, world.profiles, rows)
    base = score(working, None).astype(np.float64)
    told: list[tuple[float, float]] = []
    for name, table in predicted.items():
        for bits in (2, 4, 8):
            if packable(world.profiles[name].info.embedding_dim, bits) != bits:  # type: ignore[arg-type]
                continue
            plan = CompressionPlan(tables={name: TablePlan(bits=bits)})  # type: ignore[arg-type]
            logits = score(working, {name: resolve(plan, world.profiles)[name]})
            told.append((table_loss(table, bits), divergence(base, logits)))
    found, measured = [list(x) for x in zip(*told, strict=True)]
    assert len(found) == 13
    assert rank_correlation(found, measured) > 0.8
    ratios = [f / m for f, m in told if m < 1e-3]
    assert len(ratios) >= 5
    assert 0.5 < np.median(ratios) < 2


def table_loss(predicted: Predicted, bits: int) -> float:
    """Of a whole table coded at some bits."""
    return float(predicted.loss[:, predicted.bits.index(bits)].sum())


def divergence(base: np.ndarray, logits: np.ndarray) -> float:
    """Mean log loss of log-odds against the probabilities of others, less that of these themselves."""
    p = 1 / (1 + np.exp(-base))
    return float((np.logaddexp(0, logits) - p * logits - np.logaddexp(0, base) + p * base).mean())
