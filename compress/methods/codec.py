"""Row-wise codecs in the layout that FBGEMM's inference TBE reads, each beside its plain-torch twin.

A quantized row is fp16 scale, fp16 bias, then the codes packed from the low bits up; value = code * scale + bias. FP16
and FP32 rows are the values themselves. Rows depend on nothing but themselves, so a trial on some rows is exact.

Legend: N rows, D embedding dim, W bytes of a row.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from torch import Tensor

from compress.errors import PlanError

SCALE_BIAS_BYTES = 4
CHUNK_ROWS = 1 << 20  # bounds memory, and keeps element counts far below 2**31
QUANTIZED_BITS = (2, 4, 8)


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


def quantize_rows(weight_ND: Tensor, bits: int, clip: str = "minmax") -> Tensor:  # noqa: N803
    """Encode each row on its own, min-max scaled.

    Shapes: (N, D) fp32 -> (N, W) uint8. Layout: see the top of this file.
    Raises: PlanError unless bits is 2, 4, 8, 16 or 32 and D packs into whole bytes.
    Source: FBGEMM's fused n-bit quantizer, which puts scale and bias last; they are moved to the front here.
    """
    rows, dim = weight_ND.shape
    width = row_bytes(dim, bits)
    if rows == 0:
        return torch.empty((0, width), dtype=torch.uint8)
    weight_ND = weight_ND.float().contiguous()
    if bits == 32:
        return weight_ND.view(torch.uint8).reshape(rows, width).clone()
    if bits == 16:
        return weight_ND.half().view(torch.uint8).reshape(rows, width)
    out = torch.empty((rows, width), dtype=torch.uint8)
    for first in range(0, rows, CHUNK_ROWS):
        chunk = slice(first, first + CHUNK_ROWS)
        coded = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight_ND[chunk], bits)
        out[chunk, SCALE_BIAS_BYTES:] = coded[:, : width - SCALE_BIAS_BYTES]
        out[chunk, :SCALE_BIAS_BYTES] = coded[:, width - SCALE_BIAS_BYTES :]
    return out


def quantize_rows_oracle(weight_ND: Tensor, bits: int) -> Tensor:  # noqa: N803
    """The plain-torch twin of `quantize_rows`: the same bytes, but for codes that lie within rounding of a tie."""
    rows, dim = weight_ND.shape
    if bits == 32:
        return weight_ND.float().contiguous().view(torch.uint8).reshape(rows, -1)
    if bits == 16:
        return weight_ND.half().contiguous().view(torch.uint8).reshape(rows, -1)
    levels = 2**bits - 1
    low = weight_ND.amin(1, keepdim=True).half().float()
    span = weight_ND.amax(1, keepdim=True) - low
    scale = (span / levels).half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round((weight_ND - low) * (1.0 / scale)).clamp(0, levels).to(torch.uint8)
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    packed = (codes.view(rows, dim // per_byte, per_byte) << shifts).sum(2, dtype=torch.uint8)
    header = torch.cat([scale.half(), low.half()], dim=1).view(torch.uint8)
    return torch.cat([header, packed], dim=1)


def dequantize_rows(coded_NW: Tensor, dim: int, bits: int) -> Tensor:  # noqa: N803
    """Values (N, D) fp32 of encoded rows (N, W) uint8: the plain-torch twin of the TBE's own decoding."""
    rows = coded_NW.shape[0]
    if bits in (16, 32):
        return coded_NW.contiguous().view(torch.float16 if bits == 16 else torch.float32).float().view(rows, dim)
    header = coded_NW[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float()
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    codes = (coded_NW[:, SCALE_BIAS_BYTES:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(rows, dim).float() * header[:, :1] + header[:, 1:]
