"""Fine-tuning of coded rows: straight-through, in the tables' own codes.

Each stored row that training rows look up has an fp32 twin. Lookups read the coded row, the gradient goes to the
twin as if coding were the identity, and after each step the rows that were touched are coded again.

Legend: N stored rows of a table, M of those that a sample touches, D embedding dim, B batch, L sum of lookups' widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compress.compressor import ResolvedTable
from compress.lookup import Lookup, tier_views
from compress.methods.codec import Clip, quantize_rows
from compress.search.working_set import WorkingSet, trial_model
from trainer.data.batch import Batch
from trainer.data.transform import OOV_ROW, RESERVED_ROWS

EPS = 1e-8


@dataclass(frozen=True)
class TunedRows:
    """New values of one table's rows: ranks (M,) and values (M, D) of those with a row of their own; centroids (C, D)
    and unknown (D,) as ResolvedTable has them."""

    ranks: np.ndarray
    values: np.ndarray
    centroids: np.ndarray
    unknown: np.ndarray | None


@dataclass
class _Table:
    """One table's twins (N, D), squared gradients (N,), and where its rows come from."""

    name: str
    views: list[Tensor]
    firsts: list[int]
    bits: list[int]
    clip: Clip
    twins: Tensor
    squares: Tensor
    own: Tensor  # stored rows (M,) of the kept ranks
    ranks: np.ndarray
    part: ResolvedTable | None

    def encode(self, rows: Tensor) -> None:
        for first, bits, view in zip(self.firsts, self.bits, self.views, strict=True):
            inside = rows[(rows >= first) & (rows < first + len(view))]
            if len(inside):
                view[inside - first] = quantize_rows(self.twins[inside], bits, self.clip)


class RowTuner:
    """Row-wise Adagrad on the twins of the rows that a working set's model reads."""

    def __init__(self, working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None, lr: float) -> None:
        self.lr = lr
        self.model, rows_of = trial_model(working, resolved)
        self.lookup: Lookup = self.model.lookup
        self.tables: list[_Table | None] = []
        for stored, views in zip(self.lookup.tables, tier_views(self.lookup.block, self.lookup.tables), strict=True):
            if stored.width != stored.dim:
                self.tables.append(None)
                continue
            name = stored.name
            part = None if resolved is None else resolved[name]
            ranks = working.ranks[name]
            kept = len(ranks) if part is None else int(np.searchsorted(ranks, part.layout.kept))
            own = torch.from_numpy(rows_of[name][:kept])
            twins = torch.zeros((stored.rows, stored.dim))
            twins[own] = torch.tensor(working.weights[name][:kept])
            if part is not None and len(part.centroids):
                twins[RESERVED_ROWS : RESERVED_ROWS + len(part.centroids)] = torch.from_numpy(part.centroids)
            if part is not None and part.unknown is not None:
                twins[OOV_ROW] = torch.from_numpy(part.unknown)
            self.tables.append(
                _Table(
                    name,
                    views,
                    stored.firsts,
                    [t.bits for t in stored.tiers],
                    "search" if part is None else part.clip,
                    twins,
                    torch.zeros(stored.rows),
                    own,
                    ranks[:kept],
                    part,
                )
            )

    def step(self, batch: Batch, gradient_BL: Tensor, share: float) -> None:
        """One update from the gradient of the loss by what was looked up; `share` scales the learning rate."""
        sparse = batch.sparse
        lengths_FB = sparse.lengths().view(len(self.lookup.names), -1)
        weights = self.lookup._weights(sparse)
        values = sparse.values()
        at, column = 0, 0
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for f, t in enumerate(self.lookup.table_of):
            count, dim = int(lengths_FB[f].sum()), self.lookup.tables[t].dim
            bags = torch.repeat_interleave(torch.arange(lengths_FB.shape[1]), lengths_FB[f])
            part = gradient_BL[:, column : column + dim][bags]
            if weights is not None:
                part = part * weights[at : at + count, None]
            found.setdefault(t, []).append((values[at : at + count], part))
            at, column = at + count, column + dim
        for t, parts in found.items():
            table = self.tables[t]
            if table is None:
                continue
            rows, place = torch.unique(torch.cat([p[0] for p in parts]), return_inverse=True)
            sums = torch.zeros((len(rows), table.twins.shape[1])).index_add_(0, place, torch.cat([p[1] for p in parts]))
            table.squares[rows] += sums.square().mean(1)
            table.twins[rows] -= self.lr * share * sums / (table.squares[rows].sqrt() + EPS)[:, None]
            table.encode(rows)

    def tuned(self) -> dict[str, TunedRows]:
        """The new values of all tables."""
        found = {}
        for table in self.tables:
            if table is None:
                continue
            count = 0 if table.part is None else len(table.part.centroids)
            unknown = None
            if table.part is not None and table.part.unknown is not None:
                unknown = table.twins[OOV_ROW].numpy().copy()
            found[table.name] = TunedRows(
                table.ranks,
                table.twins[table.own].numpy().copy(),
                table.twins[RESERVED_ROWS : RESERVED_ROWS + count].numpy().copy(),
                unknown,
            )
        return found


def with_rows(
    working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None, tuned: Mapping[str, TunedRows]
) -> tuple[WorkingSet, dict[str, ResolvedTable] | None]:
    """A sample and resolved tables with tuned rows in place of the checkpoint's."""
    weights = dict(working.weights)
    for name, rows in tuned.items():
        _, here, there = np.intersect1d(working.ranks[name], rows.ranks, assume_unique=True, return_indices=True)
        weights[name] = weights[name].copy()
        weights[name][here] = rows.values[there]
    if resolved is None:
        return replace(working, weights=weights), None
    parts = {
        n: replace(p, centroids=tuned[n].centroids, unknown=tuned[n].unknown) if n in tuned else p
        for n, p in resolved.items()
    }
    return replace(working, weights=weights), parts
