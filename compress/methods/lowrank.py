"""Low rank: narrow rows and a small matrix after pooling.

Pooling is linear, so a table of rows w (D,) may store w @ encoder (r,) and multiply by decoder (r, D) after pooling.
What counts is the loss over lookups: rows are weighted by how often they are read, and errors by a metric F (D, D), the
Fisher matrix of the pooled output, where there is one. Both come as small matrices that one streamed pass sums up.

Legend: N rows, D embedding dim, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import PlanError

_FLOOR = 1e-10  # of the largest eigenvalue: directions below it are taken for that small, so that roots can be inverted


def factor(
    second_moment_DD: Tensor,
    rank: int | None = None,
    energy: float | None = None,
    metric_DD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The encoder (D, r) and decoder (r, D), fp32, of least sum of n_r e'F e, where e = w - (w @ encoder) @ decoder.

    second_moment_DD: the sum of n_r w w' over all rows. metric_DD: F, the identity if None. Give a rank, or the share
    of energy to keep. Stored columns are uncorrelated and come by falling energy, so a lower rank is a prefix of them;
    with the identity the decoder's rows are orthonormal. Else stored rows are scaled to the mean length of what they
    stand for: a metric is often small, and so would be what fp16 scales and int8 inputs have to hold.
    Raises: PlanError for a rank outside 1 to D, an energy outside 0 to 1, or matrices that are not finite and square.
    Source: Eckart and Young in the norm of F: with S = F^(1/2), the leading eigenvectors U of S M S give S U and U'/S.
    """
    moment_DD = _checked(second_moment_DD, "second moment")
    root_DD, inverse_DD = _roots(metric_DD, len(moment_DD))
    values_D, vectors_DD = torch.linalg.eigh(root_DD @ moment_DD @ root_DD)
    rank = _rank(values_D.flip(0), rank, energy)
    leading_Dr = vectors_DD[:, -rank:].flip(1)
    scale = _growth(values_D[-rank:].flip(0), leading_Dr.T @ inverse_DD)
    return (root_DD @ leading_Dr * scale).float(), (leading_Dr.T @ inverse_DD / scale).float()


def _growth(energies_r: Tensor, decoder_rD: Tensor) -> float:
    """By how much a decoder lengthens uncorrelated columns of such energies, in root mean square; 1 for nothing."""
    stored = float(energies_r.clamp_min(0).sum())
    wide = float((energies_r.clamp_min(0) * decoder_rD.square().sum(1)).sum())
    return (wide / stored) ** 0.5 if stored > 0 and wide > 0 else 1.0


def energies(second_moment_DD: Tensor, metric_DD: Tensor | None = None) -> Tensor:
    """Energy (D,) float64 of each stored column by falling size; what a rank r loses is the sum from r on."""
    moment_DD = _checked(second_moment_DD, "second moment")
    root_DD, _ = _roots(metric_DD, len(moment_DD))
    return torch.linalg.eigvalsh(root_DD @ moment_DD @ root_DD).flip(0).clamp_min(0)


def rank_for_energy(energies_D: Tensor, energy: float) -> int:
    """The least rank, at least 1, whose columns hold a share of the energy. Raises: PlanError unless in (0, 1]."""
    if not 0 < energy <= 1:
        raise PlanError(f"energy {energy}: a share above 0 and at most 1, .99 for example")
    kept_D = energies_D.clamp_min(0).double().cumsum(0)
    enough = kept_D >= energy * kept_D[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def _rank(energies_k: Tensor, rank: int | None, energy: float | None) -> int:
    if (rank is None) == (energy is None):
        raise PlanError("low rank: give a rank, or the share of energy to keep, and not both")
    if energy is not None:
        return rank_for_energy(energies_k, energy)
    assert rank is not None
    if not 1 <= rank <= len(energies_k):
        raise PlanError(f"rank {rank}: give one from 1 to {len(energies_k)}")
    return rank


def _checked(matrix_DD: Tensor, what: str) -> Tensor:
    """The matrix as symmetric float64."""
    matrix_DD = matrix_DD.detach().double()
    if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1] or not bool(torch.isfinite(matrix_DD).all()):
        raise PlanError(f"{what} of shape {tuple(matrix_DD.shape)}: a square matrix of finite numbers")
    return (matrix_DD + matrix_DD.T) / 2


def _roots(matrix_DD: Tensor | None, dim: int, what: str = "metric") -> tuple[Tensor, Tensor]:
    """Symmetric square root of a matrix, the identity if None, and its inverse (D, D) float64."""
    if matrix_DD is None:
        return torch.eye(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    matrix_DD = _checked(matrix_DD, what)
    if len(matrix_DD) != dim:
        raise PlanError(f"{what} of shape {tuple(matrix_DD.shape)}: {dim} x {dim}, as what it weighs")
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    largest = float(values_D[-1])
    if largest <= 0:
        return _roots(None, dim)
    root_D = values_D.clamp_min(_FLOOR * largest).sqrt()
    return (vectors_DD * root_D) @ vectors_DD.T, (vectors_DD / root_D) @ vectors_DD.T
