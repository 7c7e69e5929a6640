"""Row-wise codecs in the layout that FBGEMM's inference TBE reads, each beside a plain twin for the tests.

A quantized row is fp16 scale, fp16 bias, then the codes packed from the low bits up; value = code * scale + bias. FP16
and FP32 rows are the values themselves. Rows depend on nothing but themselves, so a trial on some rows is exact.
Quantizing works on transposed chunks: with rows along the contiguous axis every step of it is one vector instruction.

Legend: N rows, D embedding dim, W bytes of a row.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from compress.errors import PlanError

Clip = Literal["minmax", "search"]

SCALE_BIAS_BYTES = 4
CHUNK_ROWS = 4096  # a chunk of D=64 stays in the second-level cache; four times as many rows are 10% slower
PAD_ROWS = 64  # what is left of a vector is rounded otherwise: padded, a row's bytes do not depend on its neighbours
QUANTIZED_BITS = (2, 4, 8)
FP16_MAX = 65504.0
FP16_TINY = 2.0**-24

# Where the search begins (share of the row's own ends), and how far it then moves both ends, in steps. Against a full
# 8 x 8 grid with as many rounds this costs a fifth and loses at most .3% of RMSE (Gaussian and Laplace rows, D 16, 64).
_SHRINKS = {2: (0.4, 0.6, 0.8, 1.0), 4: (0.5, 0.7, 0.8, 0.9, 1.0), 8: (0.9, 0.95, 1.0)}
_MOVE = {2: 0.5, 4: 0.8, 8: 4.0}
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1))
_DIAGONALS = ((0.7, 0.7), (-0.7, -0.7), (0.7, -0.7), (-0.7, 0.7))
_LAST_ROUNDS = 2


def row_bytes(dim: int, bits: int) -> int:
    """W: bytes of one row as stored. Raises: PlanError when the dim cannot be packed at these bits."""
    if bits in (16, 32):
        return dim * bits // 8
    if bits not in QUANTIZED_BITS:
        raise PlanError(f"bits {bits}: a table has 2, 4, 8, 16 or 32 bits a value")
    multiple = 16 // bits
    if dim % multiple:
        raise PlanError(f"embedding_dim {dim} is not a multiple of {multiple}, which INT{bits} needs: use more bits")
    return dim * bits // 8 + SCALE_BIAS_BYTES


def quantize_rows(
    weight_ND: Tensor,
    bits: int,
    clip: Clip = "minmax",
    column_weight_D: Tensor | None = None,
) -> Tensor:
    """Encode each row on its own.

    Shapes: weight_ND (N, D) of any float type, column_weight_D (D,) -> (N, W) uint8. Layout: see the top of this file.
    "minmax" rounds bias down and scale up to fp16, so no value is off by more than half the stored scale (plus the last
    fp32 digit), whatever the row's size or offset; the smallest scale is 2**-24, so an error of 3e-8 remains in rows
    however small. "search" chooses scale and bias for the least squared error of a row, weighted by column (the
    diagonal of a Fisher matrix, say) where column_weight_D is given, and is never worse than "minmax" in it. FP16 and
    FP32 rows take no notice of either.
    Raises: PlanError unless bits is 2, 4, 8, 16 or 32 and D packs into whole bytes; for rows with NaN or infinity, and
    for values beyond fp16 unless bits is 32.
    Source: the row format of FBGEMM's n-bit inference TBE; the search alternates codes and least squares (LAQ, LSQ).
    """
    rows, dim = weight_ND.shape
    width = row_bytes(dim, bits)
    if clip not in get_args(Clip):
        raise PlanError(f"clip {clip!r}: rows are clipped by {' or '.join(get_args(Clip))}")
    column_D1 = None if column_weight_D is None else _column_weights(column_weight_D, dim)
    out = torch.empty((rows, width), dtype=torch.uint8)
    for first in range(0, rows, CHUNK_ROWS):
        values_DN = weight_ND[first : first + CHUNK_ROWS].float().t().contiguous()
        low_N, high_N = values_DN.amin(0), values_DN.amax(0)
        _check_range(low_N, high_N, bits, first)
        chunk = out[first : first + CHUNK_ROWS]
        if bits in (16, 32):
            stored = values_DN.t().contiguous().to(torch.float16 if bits == 16 else torch.float32)
            chunk.copy_(stored.view(torch.uint8))
            continue
        scale_N, bias_N = _minmax(low_N, high_N, 2**bits - 1)
        codes_DN = _codes(values_DN, scale_N, bias_N, 2**bits - 1)
        if clip == "search":
            scale_N, bias_N, codes_DN = _improve(values_DN, scale_N, bias_N, codes_DN, bits, column_D1)
        chunk[:, :SCALE_BIAS_BYTES] = torch.stack([scale_N, bias_N], dim=1).half().view(torch.uint8)
        chunk[:, SCALE_BIAS_BYTES:] = _pack(codes_DN, bits).t()
    return out


def dequantize_rows(coded_NW: Tensor, dim: int, bits: int) -> Tensor:
    """Values (N, D) fp32 of encoded rows (N, W) uint8: the plain-torch twin of the TBE's own decoding."""
    rows = coded_NW.shape[0]
    if bits in (16, 32):
        return coded_NW.contiguous().view(torch.float16 if bits == 16 else torch.float32).float().view(rows, dim)
    header = coded_NW[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float()
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    codes = (coded_NW[:, SCALE_BIAS_BYTES:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(rows, dim).float() * header[:, :1] + header[:, 1:]


# -- the parts of quantize_rows, on chunks with rows along the contiguous axis ---------------------------------------


def _check_range(low_N: Tensor, high_N: Tensor, bits: int, first: int) -> None:
    reach_N = torch.maximum(-low_N, high_N)
    bad_N = ~torch.isfinite(reach_N)
    if bool(bad_N.any()):
        raise PlanError(f"row {first + int(bad_N.int().argmax())} holds NaN or infinity: train again, or mend the row")
    worst = int(reach_N.argmax()) if bits != 32 and reach_N.numel() else 0
    if bits != 32 and reach_N.numel() and float(reach_N[worst]) > FP16_MAX:
        raise PlanError(
            f"row {first + worst} holds a value of size {float(reach_N[worst]):g}, fp16 ends at {FP16_MAX:g}, and "
            f"{bits}-bit rows need fp16: use 32 bits"
        )


def _column_weights(column_weight_D: Tensor, dim: int) -> Tensor:
    """The weights as (D, 1) fp32 with mean 1."""
    weight_D = column_weight_D.detach().float()
    if weight_D.shape != (dim,) or not bool(torch.isfinite(weight_D).all()) or bool((weight_D < 0).any()):
        raise PlanError(f"column weights of shape {tuple(weight_D.shape)}: {dim} finite numbers, none negative")
    if float(weight_D.sum()) == 0:
        return torch.ones(dim, 1)
    return (weight_D / weight_D.mean())[:, None]


def _fp16_down(values: Tensor) -> Tensor:
    """The nearest fp16 numbers that are not above the values, as fp32."""
    half = values.half()
    bits = half.view(torch.int16)
    below = torch.where(bits < 0, bits + 1, bits - 1).view(torch.float16)  # sign and magnitude: one step down
    return torch.where(half.float() > values, below, half).float()


def _minmax(low_N: Tensor, high_N: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    bias_N = _fp16_down(low_N)
    span_N = high_N - bias_N
    scale_N = -_fp16_down(-span_N / levels)
    return torch.where(span_N > 0, scale_N, torch.ones_like(scale_N)), bias_N


def _codes(values_DN: Tensor, scale_N: Tensor, bias_N: Tensor, levels: int) -> Tensor:
    # the difference first: it is exact where bias is large, a product with 1 / scale would not be
    return (values_DN - bias_N).mul_(1.0 / scale_N).round_().clamp_(0, levels)


def _pack(codes_DN: Tensor, bits: int) -> Tensor:
    """Codes packed along D: (W - 4, N) uint8."""
    packed = codes_DN[:: 8 // bits]
    for place in range(1, 8 // bits):
        packed = torch.add(packed, codes_DN[place :: 8 // bits], alpha=2 ** (bits * place))
    return packed.to(torch.uint8)


# -- the search ------------------------------------------------------------------------------------------------------


def _improve(
    values_DN: Tensor,
    scale_N: Tensor,
    bias_N: Tensor,
    codes_DN: Tensor,
    bits: int,
    column_D1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, bias and codes of least squared error: searched ones where they beat those given."""
    found_scale_N, found_bias_N = _search(values_DN, bits, column_D1)
    found_codes_DN = _codes(values_DN, found_scale_N, found_bias_N, 2**bits - 1)
    before_N = _squared_error(values_DN, scale_N, bias_N, codes_DN, column_D1)
    after_N = _squared_error(values_DN, found_scale_N, found_bias_N, found_codes_DN, column_D1)
    better_N = after_N < before_N * (1 - 1e-5)  # beyond rounding of the sums
    return (
        torch.where(better_N, found_scale_N, scale_N),
        torch.where(better_N, found_bias_N, bias_N),
        torch.where(better_N, found_codes_DN, codes_DN),
    )


def _squared_error(
    values_DN: Tensor,
    scale_N: Tensor,
    bias_N: Tensor,
    codes_DN: Tensor,
    column_D1: Tensor | None,
) -> Tensor:
    error_DN = (codes_DN * scale_N).add_(bias_N).sub_(values_DN)
    return torch.linalg.vecdot(error_DN if column_D1 is None else error_DN * column_D1, error_DN, dim=0)


def _search(values_DN: Tensor, bits: int, column_D1: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp16 scale and bias (N,) as fp32: several starts, both ends moved about the best, then alternating rounds."""
    levels = 2**bits - 1
    rows = values_DN.shape[1]
    values_DN = torch.nn.functional.pad(values_DN, (0, -rows % PAD_ROWS))
    total = len(values_DN)  # of the column weights, whose mean is 1
    weighted_DN = values_DN if column_D1 is None else values_DN * column_D1
    mean_N = weighted_DN.sum(0) / total
    centred_DN = values_DN - mean_N
    low_N, high_N = centred_DN.amin(0), centred_DN.amax(0)
    codes_DN = torch.empty_like(values_DN)

    def fit(low_N: Tensor, scale_N: Tensor) -> list[Tensor]:
        """Round to codes, then solve for the scale and mean code (N,) of these codes: [gain, scale, mean code]."""
        inverse_N = 1.0 / scale_N.clamp_min(FP16_TINY)
        torch.addcmul(-low_N * inverse_N, centred_DN, inverse_N, out=codes_DN)
        codes_DN.round_().clamp_(0, levels)
        weighted = codes_DN if column_D1 is None else codes_DN * column_D1
        mean_code_N = weighted.sum(0) / total
        variance_N = torch.linalg.vecdot(weighted, codes_DN, dim=0) - mean_code_N * mean_code_N * total
        covariance_N = torch.linalg.vecdot(weighted, centred_DN, dim=0)
        fitted_N = covariance_N / variance_N.clamp_min(1e-6)
        return [covariance_N * fitted_N, fitted_N, mean_code_N]  # the gain is what the squared error falls by

    def better(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
        wins_N = second[0] > first[0]
        return [torch.where(wins_N, b, a) for a, b in zip(first, second, strict=True)]

    best = fit(low_N, (high_N - low_N) / levels)
    for share in _SHRINKS[bits][:-1]:
        best = better(best, fit(low_N * share, (high_N - low_N) * (share / levels)))
    for moves, size in (((*_SIDES, *_DIAGONALS), _MOVE[bits]), (_SIDES, _MOVE[bits] / 2)):
        _, scale_N, mean_code_N = best
        start_N = -scale_N * mean_code_N
        for at_low, at_high in moves:
            moved_N = scale_N * (1 + (at_high - at_low) * size / levels)
            best = better(best, fit(start_N + scale_N * (at_low * size), moved_N))
    for _ in range(_LAST_ROUNDS):
        best = better(best, fit(-best[1] * best[2], best[1]))
    scale_N = best[1].clamp(FP16_TINY, FP16_MAX).half().float()
    bias_N = (mean_N - scale_N * best[2]).clamp(-FP16_MAX, FP16_MAX).half().float()
    return scale_N[:rows], bias_N[:rows]


# -- the slow twin ---------------------------------------------------------------------------------------------------


def quantize_rows_oracle(weight_ND: Tensor, bits: int, clip: Clip = "minmax") -> Tensor:
    """The plain twin of `quantize_rows`.

    "minmax": the same bytes, but for codes that lie within rounding of a tie. "search": a full grid of both ends and
    five rounds of least squares from each point; `quantize_rows` stays within 1% of its RMSE (10% at 8 bits, where the
    error is small and the grid finds lucky fits).
    """
    rows, dim = weight_ND.shape
    weight = weight_ND.float().numpy()
    if bits in (16, 32):
        stored = weight.astype(np.float16 if bits == 16 else np.float32)
        return torch.from_numpy(stored.view(np.uint8).reshape(rows, -1).copy())
    out = np.empty((rows, row_bytes(dim, bits)), dtype=np.uint8)
    for index, row in enumerate(weight):
        scale, bias = _oracle_minmax(row, 2**bits - 1) if clip == "minmax" else _oracle_search(row, bits)
        codes = _oracle_codes(row, scale, bias, 2**bits - 1).astype(np.uint8)
        places = codes.reshape(-1, 8 // bits) << (np.arange(8 // bits, dtype=np.uint8) * bits)
        out[index, :SCALE_BIAS_BYTES] = np.array([scale, bias], np.float16).view(np.uint8)
        out[index, SCALE_BIAS_BYTES:] = places.sum(1, dtype=np.uint8)
    return torch.from_numpy(out)


def _oracle_codes(row: np.ndarray, scale: np.floating, bias: np.floating, levels: int) -> np.ndarray:
    return np.round((row - np.float32(bias)) * (np.float32(1) / np.float32(scale))).clip(0, levels)


def _oracle_minmax(row: np.ndarray, levels: int) -> tuple[np.float16, np.float16]:
    bias = np.float16(row.min())
    if np.float32(bias) > row.min():
        bias = np.nextafter(bias, np.float16(-np.inf))
    step = (row.max() - np.float32(bias)) / np.float32(levels)
    scale = np.float16(step)
    if np.float32(scale) < step:
        scale = np.nextafter(scale, np.float16(np.inf))
    return (scale if step > 0 else np.float16(1)), bias


def _oracle_search(row: np.ndarray, bits: int) -> tuple[np.float16, np.float16]:
    levels = 2**bits - 1
    shares = np.linspace({2: 0.3, 4: 0.5, 8: 0.9}[bits], 1.0, 8)
    mean = row.mean(dtype=np.float64)
    low, high = np.meshgrid((row.min() - mean) * shares, (row.max() - mean) * shares)
    scale, bias = (high - low).reshape(-1, 1) / levels, mean + low.reshape(-1, 1)
    for _ in range(5):
        codes = np.round((row - bias) / np.maximum(scale, FP16_TINY)).clip(0, levels)
        mean_code, variance = codes.mean(1, keepdims=True), codes.var(1, keepdims=True)
        covariance = ((row - mean) * (codes - mean_code)).mean(1, keepdims=True)
        scale = np.where(variance > 0, covariance / np.maximum(variance, 1e-9), scale)
        bias = mean - scale * mean_code
    tried = [*zip(scale[:, 0].astype(np.float16), bias[:, 0].astype(np.float16), strict=True)]

    def error(pair: tuple[np.float16, np.float16]) -> float:
        decoded = _oracle_codes(row, *pair, levels) * np.float32(pair[0]) + np.float32(pair[1])
        return float(np.square(decoded.astype(np.float64) - row).sum())

    return min([_oracle_minmax(row, levels), *(pair for pair in tried if pair[0] > 0)], key=error)
