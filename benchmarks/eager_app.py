"""The usual way to serve a TorchRec model, for benchmarks/serve.py to compare with: FastAPI, uvicorn, eager fp32.

    python benchmarks/eager_app.py WORLD PORT same|torchrec

`same`: the model that was compressed, as it was trained. `torchrec`: TorchRec's own DLRM over tables of the same size,
which does about half the products of ours in its over-arch. Ids become rows by one array a feature, which costs less
than a real service's lookups would; the user's features are repeated for every candidate, as in an ordinary batch.

Legend: F features, I dense inputs, K candidates, N ids of a feature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from benchmarks.dense import BOTTOM, DIM, FEATURES, NUM_DENSE, OVER, jagged
from benchmarks.serve_world import ITEM, ITEM_AT, NUMBERS, USER_FEATURES, World
from trainer.checkpoint import Checkpoint
from trainer.data.batch import Batch
from trainer.data.dataset import Dataset
from trainer.models import build_ranker, module_name

Score = Callable[[Tensor, Tensor], Tensor]


class Asked(BaseModel):
    """The body of the benchmark's requests."""

    user: dict[str, float | int]
    candidates: list[int]
    k: int = 10


def make_app(world: World, model: str) -> FastAPI:
    """One route, /v1/rank, over one model in this process."""
    checkpoint, dataset = world.open()
    score = same_model(checkpoint, dataset) if model == "same" else torchrec_model(dataset)
    items = dataset.items()
    assert items is not None
    rows_of = row_arrays(dataset, len(items))
    place = {item: at for at, item in enumerate(items[ITEM].to_pylist())}
    items_MF = np.stack([rows_of[name][items[name].to_numpy()] for name in FEATURES[ITEM_AT:]], axis=1)
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/rank")
    async def rank(asked: Asked) -> dict[str, Any]:
        count = len(asked.candidates)
        user_F = [rows_of[name][int(asked.user[name])] for name in USER_FEATURES]
        own_KF = items_MF[[place[item] for item in asked.candidates]]
        ids_KF = torch.from_numpy(np.concatenate([np.tile(user_F, (count, 1)), own_KF], axis=1))
        dense_KI = torch.tensor([asked.user[name] for name in NUMBERS]).float().expand(count, -1)
        with torch.inference_mode():
            scores_K = torch.sigmoid(score(dense_KI, ids_KF)[:, 0])
        top = scores_K.topk(min(asked.k, count))
        found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {"items": [{"id": asked.candidates[at], "score": value} for at, value in found]}

    return app


def same_model(checkpoint: Checkpoint, dataset: Dataset) -> Score:
    """The trainer's own eager model: TorchRec's EmbeddingBagCollection under the head, fp32."""
    ranker = build_ranker(checkpoint.run.model, dataset.transform, "cpu").eval()
    ranker.head.load_state_dict(checkpoint.dense_state())
    with torch.no_grad():
        for name in dataset.transform.tables:
            ranker.embeddings.embedding_bags[module_name(name)].weight.copy_(checkpoint.read(f"tables/{name}/weight"))
    return lambda dense_KI, ids_KF: ranker(Batch(dense_KI, jagged(ids_KF, FEATURES)))[0]


def torchrec_model(dataset: Dataset) -> Score:
    """torchrec.models.dlrm.DLRM with random weights: only its time counts."""
    sizes = {name: dataset.transform.tables[name].num_embeddings for name in FEATURES}
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", embedding_dim=DIM, num_embeddings=size, feature_names=[f])
        for f, size in sizes.items()
    ]
    model = DLRM(EmbeddingBagCollection(tables=tables), NUM_DENSE, BOTTOM, OVER).eval()
    return lambda dense_KI, ids_KF: model(dense_KI, jagged(ids_KF, FEATURES))


def row_arrays(dataset: Dataset, ids: int) -> dict[str, np.ndarray]:
    """The row of each id (N,) of each feature; all have as many ids as there are items."""
    raw = np.arange(ids)
    return {name: dataset.transform.encode_sparse(name, pa.table({name: raw})).values for name in FEATURES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    app = make_app(World(Path(sys.argv[1]), {}), sys.argv[3])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
