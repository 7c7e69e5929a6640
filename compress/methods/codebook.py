"""Shared rows for the tail: each row reads the nearest of a few centroids, in what the loss minds.

A row then takes the bits of a centroid's number beside its key, an eighth of what INT2 takes with scale and bias. Which
centroid is nearest depends on the row alone, so a trial on some rows is exact.

Legend: N rows, S sampled rows, D embedding dim, C centroids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROUNDS = 12
CHUNK_ROWS = 2048  # their distances to 256 centroids stay in the second-level cache
MAX_CENTROIDS = 256


def metric_root(metric_DD: np.ndarray | None, dim: int) -> Tensor:
    """R (D, D) fp32 with R R' = F: rows @ R lie as far apart as the loss minds. The identity without a metric."""
    if metric_DD is None:
        return torch.eye(dim)
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(metric_DD, dtype=np.float64)))
    return (vectors * values.clamp(min=0).sqrt()).float()


def fit_codebook(rows_SD: Tensor, weight_S: Tensor, count: int, root_DD: Tensor) -> Tensor:
    """Centroids (C, D) fp32 of least weighted squared distance to rows, both seen through `root_DD`.

    Lloyd's algorithm from groups of equal weight along the widest direction; no chance in it.
    """
    seen = rows_SD.float() @ root_DD
    weight = weight_S.double().clamp(min=1e-12)
    centred = (seen - (weight.float() @ seen) / weight.sum().float()).double()
    _, vectors = torch.linalg.eigh((centred * weight[:, None]).T @ centred)
    order = torch.argsort(centred @ vectors[:, -1])
    through = weight[order].cumsum(0) / weight.sum()
    group = torch.empty(len(order), dtype=torch.long)
    group[order] = (through * count).long().clamp(max=count - 1)
    for _ in range(ROUNDS):
        far, group = torch.cdist(seen, _means(seen, weight, group, count)).min(1)
        empty = torch.nonzero(torch.bincount(group, minlength=count) == 0).flatten()
        worst = (far.double().square() * weight).topk(min(len(empty), len(far))).indices
        group[worst] = empty[: len(worst)]  # a centroid that nobody reads goes where most is lost
    return _means(rows_SD.float(), weight, group, count)


def _means(rows_SD: Tensor, weight_S: Tensor, group_S: Tensor, count: int) -> Tensor:
    sums = torch.zeros((count, rows_SD.shape[1]), dtype=torch.float64)
    sums.index_add_(0, group_S, rows_SD.double() * weight_S[:, None])
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, group_S, weight_S)
    mean = (rows_SD.double() * weight_S[:, None]).sum(0) / weight_S.sum()
    return torch.where((total > 0)[:, None], sums / total.clamp(min=1e-300)[:, None], mean).float()


def nearest(rows_ND: Tensor, centroids_CD: Tensor, root_DD: Tensor) -> np.ndarray:
    """The number (N,) uint8 of each row's nearest centroid, seen through `root_DD`."""
    found = np.empty(len(rows_ND), dtype=np.uint8)
    middle_D = centroids_CD.mean(0)  # what rows have in common would cost the digits in which they differ
    seen_CD = (centroids_CD - middle_D) @ root_DD
    through_DC = -2 * root_DD @ seen_CD.T
    squares_C = seen_CD.square().sum(1)
    for first in range(0, len(rows_ND), CHUNK_ROWS):
        far_NC = torch.addmm(squares_C, rows_ND[first : first + CHUNK_ROWS].float() - middle_D, through_DC)
        found[first : first + CHUNK_ROWS] = far_NC.argmin(1).numpy()
    return found
