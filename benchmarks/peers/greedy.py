"""PyTorch core's own quantizer of embedding rows, in the layout of compress/methods/codec.py: a peer to measure by.

Legend: N rows, D embedding dim, W bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.methods.codec import SCALE_BIAS_BYTES, row_bytes


def greedy_rows(weight_ND: Tensor, bits: int) -> Tensor:
    """Encode rows (N, D) as (N, W) uint8, the clip of each found by torch's greedy search. Bits: 4 or 2.

    Source: torch.ops.quantized.embedding_bag_4bit_prepack with optimized_qparams, at its own 200 bins and ratio .16.
    """
    width = row_bytes(weight_ND.shape[1], bits)
    prepack = {4: torch.ops.quantized.embedding_bag_4bit_prepack, 2: torch.ops.quantized.embedding_bag_2bit_prepack}
    coded = prepack[bits](weight_ND.float().contiguous(), optimized_qparams=True)
    split = width - SCALE_BIAS_BYTES  # torch puts scale and bias last
    return torch.cat([coded[:, split:], coded[:, :split]], dim=1)
