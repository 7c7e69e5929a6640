"""A low-rank table's decoder becomes a part of the layers that read the table, where all of them are linear.

A Linear that reads x @ decoder through columns W reads x through W @ decoder' as well. The table then gives `width`
columns in place of D, and the product after the lookup is gone: for each row scored, width * D + D * O products become
width * O, so it always pays. What an architecture allows it says itself (trainer.models.ranker.Head.linear_readers).

Legend: D embedding dim, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compress.onnx_head import ONNX_HEAD
from trainer.config import ModelConfig
from trainer.data.transform import Transform
from trainer.models import Head, build_head


def foldable_tables(model: ModelConfig, transform: Transform, dense: Iterable[str]) -> set[str]:
    """The tables of which every feature is read by linear layers alone. `dense`: names in the head's state dict."""
    if ONNX_HEAD in dense:
        return set()
    head = _skeleton(model, transform)
    features = list(transform.sparse)
    return {
        name
        for name, table in transform.tables.items()
        if table.features and all(head.linear_readers(features.index(f)) for f in table.features)
    }


def fold_decoders(
    model: ModelConfig, transform: Transform, dense: Mapping[str, Tensor], decoders: Mapping[str, Tensor]
) -> tuple[Transform, dict[str, Tensor]]:
    """Put decoders (width, D), by table, into a head's state dict `dense`, which stays as it was.

    Returns: the transform whose tables give `width` columns, and the state dict of the head that is built for it.
    """
    dense = dict(dense)
    if not decoders:
        return transform, dense
    head = _skeleton(model, transform)
    reads: dict[str, list[tuple[int, Tensor]]] = {}
    for place, feature in enumerate(transform.sparse):
        decoder = decoders.get(transform.table_of(feature).name)
        if decoder is not None:
            readers = head.linear_readers(place)
            assert readers, f"{feature}: more than linear layers read it"
            for name, start in readers:
                reads.setdefault(name, []).append((start, decoder))
    for name, parts in reads.items():
        dense[f"{name}.weight"] = folded_weight(dense[f"{name}.weight"], parts)
    return transform.with_widths({name: len(decoder) for name, decoder in decoders.items()}), dense


def folded_weight(weight_OI: Tensor, parts: Iterable[tuple[int, Tensor]]) -> Tensor:
    """A weight whose columns from `start` on read what a decoder (width, D) made, for each of `parts`: (O, less) fp32.

    Multiplied in fp64, as nothing may be lost that the decoder's own product kept.
    """
    columns, at = [], 0
    for start, decoder in sorted(parts, key=lambda part: part[0]):
        end = start + decoder.shape[1]
        columns += [weight_OI[:, at:start], (weight_OI[:, start:end].double() @ decoder.double().t()).float()]
        at = end
    return torch.cat([*columns, weight_OI[:, at:]], dim=1)


def _skeleton(model: ModelConfig, transform: Transform) -> Head:
    """The head without memory for its weights."""
    with torch.device("meta"):
        return build_head(model, transform)
