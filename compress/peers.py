"""Other people's quantization of the same checkpoint, as rows of result tables: torchrec's, and PyTorch core's greedy.

Both code rows one by one, so coding the rows of a working set gives the scores that the whole model would. Sizes are of
the whole tables, as each stores them. Neither stores an id map; one like ours for every id is counted beside
(`id_map_bytes`), as whoever serves raw ids of a vocabulary needs one.

Legend: N rows, D embedding dim, W bytes of a row, B batch, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import QuantConfig
from torchrec.quant.embedding_modules import DEFAULT_ROW_ALIGNMENT
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from compress.errors import PlanError
from compress.ids import id_map_bytes
from compress.methods.codec import SCALE_BIAS_BYTES, dequantize_rows, row_bytes
from compress.model import SCORE_ROWS
from compress.search.profile import TableProfile
from compress.search.working_set import WorkingSet, score
from trainer.data.batch import to_batch
from trainer.data.transform import RESERVED_ROWS, TableInfo, Transform
from trainer.models import build_ranker, module_name

PeerName = Literal["torchrec", "torch greedy"]
_TORCHREC_TYPES = {8: torch.int8, 4: torch.quint4x2, 2: torch.quint2x4}


@dataclass(frozen=True)
class Peer:
    """One way of quantizing all tables. Bits a value: 8, 4 or 2 of torchrec, 4 or 2 of greedy."""

    name: PeerName
    bits: int

    @property
    def label(self) -> str:
        """How result tables call it."""
        return f"{self.name} INT{self.bits}"

    def table_bytes(self, tables: Mapping[str, TableInfo]) -> int:
        """Bytes of whole tables: torchrec pads each row to a multiple of 16 bytes, PyTorch core does not.

        Raises: PlanError for a dim that these bits cannot pack.
        """
        align = DEFAULT_ROW_ALIGNMENT if self.name == "torchrec" else 1
        total = 0
        for table in tables.values():
            width = row_bytes(table.embedding_dim, self.bits)
            total += table.num_embeddings * -(-width // align) * align
        return total

    def logits(self, working: WorkingSet) -> np.ndarray:
        """Log-odds (N, T) of a sample. Raises: PlanError for a dim that these bits cannot pack."""
        for table in working.transform.tables.values():
            row_bytes(table.embedding_dim, self.bits)
        return torchrec_logits(working, self.bits) if self.name == "torchrec" else greedy_logits(working, self.bits)


PEERS = (
    Peer("torchrec", 8),
    Peer("torchrec", 4),
    Peer("torchrec", 2),
    Peer("torch greedy", 4),
    Peer("torch greedy", 2),
)


def whole_id_maps_bytes(profiles: Mapping[str, TableProfile]) -> int:
    """Bytes of id maps in which every id of training has a row of its own."""
    rows = {name: p.info.num_embeddings for name, p in profiles.items()}
    return sum(id_map_bytes(n, [n - RESERVED_ROWS], [], profiles[name].key_bits) for name, n in rows.items())


# -- torchrec ---------------------------------------------------------------------------------------------------------


def torchrec_ranker(working: WorkingSet, bits: int) -> nn.Module:
    """The checkpoint's ranker over the rows of a working set, its tables quantized by torchrec.

    As torchrec's quantize_inference_model does it, which itself fails at INT4 and INT2 (torchrec 1.8.0: it calls `to`
    on the packed rows, which have none).
    """
    infos = {
        name: replace(table, num_embeddings=len(working.weights[name]))
        for name, table in working.transform.tables.items()
    }
    whole = working.transform
    small = Transform(whole.schema, infos, {}, whole.numerics, whole.lineage, whole.weighted)
    ranker = build_ranker(working.run.model, small, device="cpu")
    with torch.no_grad():
        for name, weight in working.weights.items():
            ranker.embeddings.embedding_bags[module_name(name)].weight.copy_(torch.tensor(weight))
    ranker.head.load_state_dict({key: torch.tensor(value) for key, value in working.dense.items()})
    kinds = {"dtype": _TORCHREC_TYPES[bits]}
    observer = torch.ao.quantization.PlaceholderObserver
    ranker.embeddings.qconfig = QuantConfig(observer.with_args(dtype=torch.float), observer.with_args(**kinds), {})
    ranker.embeddings = QuantEmbeddingBagCollection.from_float(ranker.embeddings)
    return ranker.eval()


@torch.inference_mode()
def torchrec_logits(working: WorkingSet, bits: int) -> np.ndarray:
    """Log-odds (N, T) of a sample by torchrec's own quantized EmbeddingBagCollection."""
    ranker = torchrec_ranker(working, bits)
    parts = []
    for at in range(0, len(working.labels), SCORE_ROWS):
        index = np.arange(at, min(at + SCORE_ROWS, len(working.labels)))
        parts.append(ranker(to_batch(working.sample.take(index)))[0].numpy())
    return np.concatenate(parts)


# -- PyTorch core -----------------------------------------------------------------------------------------------------


def greedy_rows(weight_ND: Tensor, bits: int) -> Tensor:
    """Encode rows (N, D) as (N, W) uint8, the clip of each found by torch's greedy search. Bits: 4 or 2.

    Layout: that of compress/methods/codec.py. Raises: PlanError for other bits, or a dim that they cannot pack.
    Source: torch.ops.quantized.embedding_bag_4bit_prepack with optimized_qparams, at its own 200 bins and ratio .16.
    """
    prepack = {4: torch.ops.quantized.embedding_bag_4bit_prepack, 2: torch.ops.quantized.embedding_bag_2bit_prepack}
    if bits not in prepack:
        raise PlanError(f"bits {bits}: PyTorch's greedy quantizer has 4 and 2: use torchrec's for 8")
    split = row_bytes(weight_ND.shape[1], bits) - SCALE_BIAS_BYTES  # torch puts scale and bias last
    coded = prepack[bits](weight_ND.float().contiguous(), optimized_qparams=True)
    return torch.cat([coded[:, split:], coded[:, :split]], dim=1)


def greedy_logits(working: WorkingSet, bits: int) -> np.ndarray:
    """Log-odds (N, T) of a sample whose rows are greedily quantized."""
    weights = {}
    for name, weight in working.weights.items():
        rows = greedy_rows(torch.tensor(weight), bits)
        weights[name] = dequantize_rows(rows, weight.shape[1], bits).numpy()
    return score(replace(working, weights=weights), None)
