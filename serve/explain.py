"""What each feature contributed to a score, by occlusion: the score with it, less the score with it missing.

Not additive: features that say the same thing each contribute little, and the contributions of an item do not sum to
its score. Missing is what training knew as missing, not an average value.

Legend: K items, F features, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from compress.model import CompressedModel
from trainer.data.encoded import Encoded, concatenate

MOST_EXPLAINED = 100  # items a request: each costs F more rows


class Explainer:
    """Contributions for one model."""

    def __init__(self, model: CompressedModel) -> None:
        self.model = model
        self.features = [f.name for f in model.transform.schema.features]
        self.missing = model.transform.encode(pa.table({"_": pa.nulls(1)}))
        dense = model.transform.dense_names
        self.dense = {f: [i for i, n in enumerate(dense) if n.removesuffix(".missing") == f] for f in self.features}

    def contributions(self, rows: Encoded, value: Callable[[np.ndarray], np.ndarray]) -> list[dict[str, float]]:
        """Contributions by feature of each of K encoded rows, from one pass over (1 + F) K rows.

        `value` makes of log-odds (N, T) the numbers (N,) that are compared.
        """
        variants = [rows, *(self._without(rows, feature) for feature in self.features)]
        values = value(self.model.score_encoded(concatenate(variants))).reshape(len(variants), len(rows))
        with np.errstate(over="ignore"):
            differences = np.nan_to_num(values[0] - values[1:])  # (F, K)
        return [dict(zip(self.features, each, strict=True)) for each in differences.T.tolist()]

    def _without(self, rows: Encoded, feature: str) -> Encoded:
        """The rows with one feature missing."""
        sparse, dense = rows.sparse, rows.dense
        if feature in sparse:
            sparse = {**sparse, feature: self.missing.sparse[feature].repeat(len(rows))}
        if self.dense[feature]:
            dense = dense.copy()
            dense[:, self.dense[feature]] = self.missing.dense[:, self.dense[feature]]
        return Encoded(sparse, dense)
