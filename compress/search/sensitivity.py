"""How much the loss minds an error in a looked-up row, and what coding or cutting rows would cost: predicted losses.

The Fisher matrix F (D, D) of a table is the mean over lookups of p (1 - p) dz dz', with z a log-odds, p its probability
and dz its gradient by the looked-up row (the Gauss-Newton form: it needs no labels, and the gradient at a trained
model's optimum would vanish). An error e in a row that is looked up n times in N training rows then costs about
1/2 (n / N) e' F e nats of log loss.

Legend: N rows of a table, D embedding dim, E bucket edges (E - 1 buckets), B options of bits, S sampled rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.config import Clip
from compress.errors import PlanError
from compress.methods.codec import dequantize_rows, quantize_rows, row_bytes
from compress.model import SCORE_ROWS
from compress.search.profile import UNSEEN_WEIGHT, TableProfile
from compress.search.working_set import extract, trial_model
from trainer.checkpoint import Checkpoint
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset
from trainer.data.reader import spread_rows
from trainer.progress import ReportProgress

SAMPLE_ROWS = 200_000
BUCKET_ROWS = 512  # rows of a bucket that are coded to see what coding costs
BITS = (2, 4, 8, 16, 32)
CLIPS: tuple[Clip, ...] = ("search", "minmax")


def sensitivities(
    checkpoint: Checkpoint, dataset: Dataset, progress: ReportProgress, limit: int = SAMPLE_ROWS
) -> dict[str, np.ndarray]:
    """Fisher matrix (D, D) float64 of each table, from one backward pass over up to `limit` training rows."""
    transform = dataset.transform
    rows = spread_rows(dataset, "train", limit)
    working = extract(checkpoint, transform, None, rows)
    model, _ = trial_model(working, None)
    tables = [model.lookup.tables[t] for t in model.lookup.table_of]
    sums = {t.name: torch.zeros((t.dim, t.dim), dtype=torch.float64) for t in model.lookup.tables}
    lookups = dict.fromkeys(sums, 0.0)
    for at in range(0, len(rows), SCORE_ROWS):
        batch = to_batch(working.sample.take(np.arange(at, min(at + SCORE_ROWS, len(rows)))))
        pooled = model.lookup(batch.sparse).requires_grad_()
        logits = model.head(batch.dense, pooled)
        weights = model.lookup.squared_weights(batch.sparse)
        for task in range(logits.shape[1]):
            z = logits[:, task]
            (gradient,) = torch.autograd.grad(z.sum(), pooled, retain_graph=task + 1 < logits.shape[1])
            spread = torch.sigmoid(z.detach())
            spread = spread * (1 - spread)
            for index, part in enumerate(gradient.split([t.dim for t in tables], dim=1)):
                weighted = part * (spread * weights[index]).unsqueeze(1)
                sums[tables[index].name] += (weighted.T @ part).double()
        for index, count in enumerate(batch.sparse.lengths().view(len(tables), -1).sum(1).tolist()):
            lookups[tables[index].name] += count
        progress("sensitivity", min(at + SCORE_ROWS, len(rows)), len(rows))
    return {name: (total / max(lookups[name], 1.0)).numpy() for name, total in sums.items()}


@dataclass(frozen=True)
class Predicted:
    """What each bucket of a table's rows would cost, in nats of mean log loss over the training rows.

    coded (E - 1, B), by how rows are clipped: coded at each of `bits`. nearest (E - 1,), by the number of centroids:
    reading the nearest of them. cut (E,): all rows from an edge on read their mean row; shared (E,): they and unknown
    ids read one row. Rank edges are the profile's.
    """

    bits: tuple[int, ...]
    coded: dict[Clip, np.ndarray]
    nearest: dict[int, np.ndarray]
    cut: np.ndarray
    shared: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """Coded at each of `bits` (E - 1, B), clipped as costs less."""
        return np.minimum.reduce(list(self.coded.values()))

    def clip(self, buckets: slice, option: int) -> Clip:
        """How rows of some buckets are clipped best at one of the bits."""
        return min(self.coded, key=lambda clip: self.coded[clip][buckets, option].sum())


def predict(
    checkpoint: Checkpoint,
    profiles: Mapping[str, TableProfile],
    fisher: Mapping[str, np.ndarray],
    training_rows: int,
    progress: ReportProgress,
    clips: Sequence[Clip] = CLIPS,
) -> dict[str, Predicted]:
    """Predicted losses of every table, from a sample of each bucket's rows, clipped in each of some ways."""
    found = {}
    for index, (name, profile) in enumerate(profiles.items()):
        found[name] = predict_table(checkpoint, profile, fisher[name], training_rows, clips)
        progress("predict", index + 1, len(profiles))
    return found


def predict_table(
    checkpoint: Checkpoint,
    profile: TableProfile,
    fisher_DD: np.ndarray,
    training_rows: int,
    clips: Sequence[Clip] = CLIPS,
) -> Predicted:
    """Predicted losses of one table. Values are relative to a table read exactly."""
    dim, edges = profile.info.embedding_dim, profile.edges
    bits = tuple(b for b in BITS if _packs(dim, b))
    fisher = torch.from_numpy(np.asarray(fisher_DD, dtype=np.float64))
    chosen, bucket = sampled_rows(profile)
    rows = checkpoint.table_rows(profile.info.name, chosen)

    def by_bucket(error: torch.Tensor) -> np.ndarray:
        """Sum (E - 1,) of n e' F e over each bucket, from its sampled rows' mean by lookups."""
        counts = np.maximum(profile.counts[chosen].astype(np.float64), UNSEEN_WEIGHT)
        minded = np.bincount(bucket, counts * quadratic(error, fisher).numpy(), len(edges) - 1)
        return profile.weights * minded / np.bincount(bucket, counts, len(edges) - 1)

    scale = 0.5 / training_rows
    coded: dict[Clip, np.ndarray] = {}
    for how in clips:
        errors = [dequantize_rows(quantize_rows(rows, each, how), dim, each) - rows for each in bits]
        coded[how] = scale * np.stack([by_bucket(error) for error in errors], axis=1)
    near = {
        count: by_bucket(torch.from_numpy(book.centroids[book.numbers[chosen]]) - rows)
        for count, book in profile.codebooks.items()
    }
    energy = by_bucket(rows)
    after = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    sums = np.concatenate([np.cumsum(profile.sums[::-1], axis=0)[::-1], np.zeros((1, dim))])
    weights = np.concatenate([np.cumsum(profile.weights[::-1])[::-1], [0.0]])
    cut = after - _explained(sums, weights, fisher_DD)
    oov = profile.oov.astype(np.float64)
    known = after + profile.unknown * float(oov @ fisher_DD @ oov)
    both = known - _explained(sums + profile.unknown * oov, weights + profile.unknown, fisher_DD)
    nearest = {count: scale * costs for count, costs in near.items()}
    return Predicted(bits, coded, nearest, scale * np.maximum(cut, 0.0), scale * np.maximum(both, 0.0))


def sampled_rows(profile: TableProfile) -> tuple[np.ndarray, np.ndarray]:
    """Training rows (S,), rising, up to BUCKET_ROWS of each bucket, and the bucket (S,) of each."""
    rng = np.random.default_rng(0)
    rows, buckets = [], []
    for bucket, (first, last) in enumerate(itertools.pairwise(profile.edges.tolist())):
        ranks = np.arange(first, last)
        if len(ranks) > BUCKET_ROWS:
            ranks = rng.choice(last - first, BUCKET_ROWS, replace=False) + first
        rows.append(profile.order[ranks])
        buckets.append(np.full(len(ranks), bucket))
    chosen, bucket_of = np.concatenate(rows), np.concatenate(buckets)
    order = np.argsort(chosen)
    return chosen[order], bucket_of[order]


def quadratic(rows_SD: torch.Tensor, fisher_DD: torch.Tensor) -> torch.Tensor:
    """w' F w (S,) float64 of each row."""
    wide = rows_SD.double()
    return ((wide @ fisher_DD) * wide).sum(1)


def _explained(sums_ED: np.ndarray, weights_E: np.ndarray, fisher_DD: np.ndarray) -> np.ndarray:
    """W c' F c (E,) of the mean rows c = sums / W: what reading the mean saves of reading zeros."""
    means = sums_ED / np.maximum(weights_E, 1e-12)[:, None]
    return weights_E * ((means @ fisher_DD) * means).sum(1)


def _packs(dim: int, bits: int) -> bool:
    try:
        row_bytes(dim, bits)
    except PlanError:
        return False
    return True
