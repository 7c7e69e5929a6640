"""compress/methods/lowrank.py against torch.linalg.svd, and against what nudged factors would reach.

Legend: N rows, D embedding dim, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import PlanError
from compress.methods.lowrank import energies, factor, rank_for_energy


def second_moment(rows_ND: torch.Tensor, weight_N: torch.Tensor | None = None) -> torch.Tensor:
    """The sum (D, D) of n w w' over rows, as a profile gives it."""
    weight_N = torch.ones(len(rows_ND)) if weight_N is None else weight_N
    return (rows_ND.double() * weight_N.double()[:, None]).T @ rows_ND.double()


def rows_and_weights(rows: int = 300, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated rows (N, D) float64 whose energy falls fast, and counts (N,)."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.7 ** torch.arange(dim).double()
    mix = torch.linalg.qr(torch.randn((dim, dim), generator=generator, dtype=torch.float64))[0]
    rows_ND = torch.randn((rows, dim), generator=generator, dtype=torch.float64) * scales @ mix
    return rows_ND, torch.randint(0, 50, (rows,), generator=generator).double()


def metric(dim: int = 12, seed: int = 1) -> Tensor:
    """A positive definite matrix (D, D) far from the identity."""
    root = torch.randn((dim, dim), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.01 * torch.eye(dim)


def lost(rows_ND: Tensor, weight_N: Tensor, pair: tuple[Tensor, Tensor], metric_DD: Tensor) -> float:
    """The sum of n_r e'F e."""
    error_ND = rows_ND - (rows_ND @ pair[0].double()) @ pair[1].double()
    return float((weight_N * ((error_ND @ metric_DD) * error_ND).sum(1)).sum())


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_factor_equals_the_weighted_svd(rank: int) -> None:
    rows_ND, weight_N = rows_and_weights()
    pair = factor(second_moment(rows_ND, weight_N), rank=rank)
    assert [p.shape for p in pair] == [(12, rank), (rank, 12)]
    root_N1 = weight_N.sqrt()[:, None]
    left, values, right = torch.linalg.svd(root_N1 * rows_ND, full_matrices=False)
    best_ND = (left[:, :rank] * values[:rank]) @ right[:rank]
    found_ND = root_N1 * ((rows_ND @ pair[0].double()) @ pair[1].double())
    assert torch.allclose(found_ND, best_ND, atol=1e-4)
    expected = float(values[rank:].square().sum())
    assert lost(rows_ND, weight_N, pair, torch.eye(12).double()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_factor_in_a_metric_equals_the_svd_of_rows_times_its_root(rank: int) -> None:
    rows_ND, weight_N = rows_and_weights(seed=2)
    metric_DD = metric()
    moment_DD = second_moment(rows_ND, weight_N)
    pair = factor(moment_DD, rank=rank, metric_DD=metric_DD)
    half_DD = torch.linalg.cholesky(metric_DD)
    values = torch.linalg.svdvals(weight_N.sqrt()[:, None] * rows_ND @ half_DD)
    found = lost(rows_ND, weight_N, pair, metric_DD)
    assert found == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
    assert found < 0.9 * lost(rows_ND, weight_N, factor(moment_DD, rank=rank), metric_DD)
    assert energies(moment_DD, metric_DD)[rank:].sum() == pytest.approx(found, rel=1e-4)


def test_factor_cannot_be_bettered_by_a_nudge() -> None:
    rows_ND, weight_N = rows_and_weights(seed=3)
    metric_DD = metric(seed=4)
    encoder, decoder = factor(second_moment(rows_ND, weight_N), rank=4, metric_DD=metric_DD)
    least = lost(rows_ND, weight_N, (encoder, decoder), metric_DD)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2):
        for _ in range(20):
            nudged = [m + size * torch.randn(m.shape, generator=generator) for m in (encoder, decoder)]
            assert lost(rows_ND, weight_N, (nudged[0], decoder), metric_DD) > least
            assert lost(rows_ND, weight_N, (encoder, nudged[1]), metric_DD) > least


def test_factor_lower_ranks_are_prefixes_of_uncorrelated_columns() -> None:
    rows_ND, weight_N = rows_and_weights(seed=5)
    moment_DD = second_moment(rows_ND, weight_N)
    encoder, decoder = factor(moment_DD, rank=6)
    lower = factor(moment_DD, rank=3)
    assert torch.allclose(encoder[:, :3], lower[0])
    assert torch.allclose(decoder[:3], lower[1])
    stored = encoder.double().T @ moment_DD @ encoder.double()
    assert torch.allclose(stored.diagonal(), energies(moment_DD)[:6], rtol=1e-5)
    assert float((stored - torch.diag(stored.diagonal())).abs().max()) < 1e-5 * float(stored[0, 0])
    assert torch.allclose(decoder @ decoder.T, torch.eye(6), atol=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_factor_stores_rows_as_long_as_what_they_stand_for(size: float) -> None:
    """A metric of any size: a small one would bring rows near zero, where fp16 scales end."""
    rows_ND, weight_N = rows_and_weights(seed=8)
    encoder, decoder = factor(second_moment(rows_ND, weight_N), rank=4, metric_DD=size * metric())
    narrow = rows_ND @ encoder.to(rows_ND.dtype)
    wide = narrow @ decoder.to(rows_ND.dtype)
    lengths = [float((weight_N[:, None] * each.square()).sum()) for each in (narrow, wide)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_factor_at_full_rank_loses_nothing() -> None:
    rows_ND, weight_N = rows_and_weights(seed=6)
    encoder, decoder = factor(second_moment(rows_ND, weight_N), rank=12, metric_DD=metric())
    assert torch.allclose(encoder @ decoder, torch.eye(12), atol=1e-4)


def test_factor_of_a_table_that_is_zero_or_read_by_nobody_is_finite() -> None:
    for metric_DD in (None, torch.zeros(4, 4), torch.ones(4, 4)):
        encoder, decoder = factor(torch.zeros(4, 4), rank=2, metric_DD=metric_DD)
        assert torch.isfinite(encoder).all()
        assert torch.isfinite(decoder).all()


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4), (1e-9, 1)])
def test_rank_for_energy_is_the_least_that_keeps_enough(energy: float, rank: int) -> None:
    assert rank_for_energy(torch.tensor([5.0, 3.0, 1.5, 0.5, 0.0]), energy) == rank


def test_factor_by_energy_keeps_that_share() -> None:
    rows_ND, weight_N = rows_and_weights()
    moment_DD = second_moment(rows_ND, weight_N)
    for energy in (0.3, 0.9, 0.99):
        pair = factor(moment_DD, energy=energy)
        rank = pair[0].shape[1]
        total = float(moment_DD.trace())
        identity = torch.eye(12).double()
        assert lost(rows_ND, weight_N, pair, identity) <= (1 - energy) * total + 1e-6 * total
        if rank > 1:
            lower = factor(moment_DD, rank=rank - 1)
            assert lost(rows_ND, weight_N, lower, identity) > (1 - energy) * total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank, or"),
        ({"rank": 2, "energy": 0.5}, "give a rank, or"),
        ({"rank": 0}, "rank 0: give one from 1 to 4"),
        ({"rank": 5}, "rank 5: give one from 1 to 4"),
        ({"energy": 0.0}, "energy 0.0"),
        ({"energy": 1.1}, "energy 1.1"),
        ({"rank": 2, "metric_DD": torch.eye(3)}, "metric of shape"),
        ({"rank": 2, "metric_DD": torch.full((4, 4), float("nan"))}, "metric of shape"),
    ],
)
def test_factor_refuses_what_it_cannot_do(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        factor(torch.eye(4), **options)


def test_factor_refuses_moments_that_are_not_finite_and_square() -> None:
    for moment in (torch.full((4, 4), float("inf")), torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(PlanError, match="second moment"):
            factor(moment, rank=1)
