"""What each lever of the dense part gives when one request ranks 500 candidates: python benchmarks/dense.py.

One thread, in process, on an MLPerf-size DLRM built of TorchRec's own modules (26 tables of D=64, 13 numbers, bottom
MLP 512-256-64, over-arch 1024-1024-512-256-1). Of the tables 16 belong to the request (user and context) and 10 to the
item; the numbers belong to the request. The model is trained first, on a synthetic log whose rows carry latent factors,
so that delta NE means something; embeddings are fixed there and the dense part learns. Every variant answers
the same requests, taken in turns, and one JSON object is printed: p50 and p99 ms, ratios, delta NE.

Legend: B batch, F features, D embedding dim, I dense inputs, K candidates, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.models.dlrm import pair_dots
from trainer.models.ranker import Head

FEATURES = [f"t{i:02}" for i in range(26)]
ITEM_FEATURES = set(FEATURES[16:])
DIM, NUM_DENSE, LATENT = 64, 13, 8
BOTTOM, OVER = [512, 256, DIM], [1024, 1024, 512, 256, 1]


class TorchRecHead(Head):
    """The dense part of TorchRec's DLRM as a head: what an adapter of a model trained elsewhere looks like."""

    def __init__(self, bottom: nn.Sequential, top: nn.Sequential, out: nn.Module) -> None:
        super().__init__()
        self.bottom, self.top, self.out = bottom, top, out
        vectors = len(FEATURES) + 1
        rows, columns = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)

    def logits(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:  # noqa: N803
        """Logits (B, 1)."""
        bottom_BD = self.bottom(dense_BI)
        vectors = [bottom_BD, *looked_up_BL.split([DIM] * len(FEATURES), dim=1)]
        return self.out(self.top(torch.cat([bottom_BD, pair_dots(vectors, self.pairs)], dim=1)))


def head_of(model: DLRM) -> TorchRecHead:
    """The same weights, laid out as this project's heads are: Linear and ReLU in a row."""

    def flat(module: nn.Module) -> list[nn.Module]:
        perceptrons = [m for m in module.modules() if type(m).__name__ == "Perceptron"]
        return [layer for p in perceptrons for layer in (p._linear, nn.ReLU())]

    bottom, over = nn.Sequential(*flat(model.dense_arch)), nn.Sequential(*flat(model.over_arch))
    out = model.over_arch.model[-1]
    assert isinstance(out, nn.Linear)
    return TorchRecHead(bottom, over, out).eval()


@dataclass
class Log:
    """A synthetic log: fixed embeddings of N rows a feature, and the truth that labels are drawn from."""

    weights_FND: Tensor
    latents_FNR: Tensor
    effects_FN: Tensor
    strengths_FF: Tensor
    numbers: nn.Module

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers (B, I), ids (B, F) and labels (B, 1)."""
        dense_BI = torch.randn((rows, NUM_DENSE), generator=generator)
        size = self.weights_FND.shape[1]
        u = torch.rand((rows, len(FEATURES)), generator=generator)
        ids_BF = (torch.exp(u * math.log(size)) - 1).long().clamp_(max=size - 1)  # about Zipf's law
        f = torch.arange(len(FEATURES))
        latents_BFR = self.latents_FNR[f, ids_BF]
        pairs = torch.einsum("bfr,fg,bgr->b", latents_BFR, self.strengths_FF, latents_BFR)
        with torch.no_grad():
            logit_B = self.effects_FN[f, ids_BF].sum(1) + pairs + self.numbers(dense_BI).squeeze(1) - 1.2
        return dense_BI, ids_BF, torch.bernoulli(torch.sigmoid(logit_B), generator=generator).unsqueeze(1)

    def looked_up(self, ids_BF: Tensor) -> Tensor:
        """Embeddings (B, F * D) of one id a feature."""
        return self.weights_FND[torch.arange(len(FEATURES)), ids_BF].flatten(1)


def make_log(rows: int, seed: int = 0) -> Log:
    """Rows are linear in latent factors and an effect of their own, with noise."""
    torch.manual_seed(seed)
    count = len(FEATURES)
    latents = torch.randn(count, rows, LATENT)
    effects = 0.25 * torch.randn(count, rows)
    mix = torch.randn(count, LATENT + 1, DIM) / math.sqrt(LATENT + 1)
    weights = torch.empty(count, rows, DIM)
    for f in range(count):
        weights[f] = 0.5 * torch.cat([latents[f], 4 * effects[f, :, None]], dim=1) @ mix[f]
        weights[f] += 0.05 * torch.randn(rows, DIM)
    chosen = torch.triu(torch.rand(count, count) < 0.12, diagonal=1)
    strengths = chosen * torch.randn(count, count) * 0.06
    numbers = nn.Sequential(nn.Linear(NUM_DENSE, 32), nn.Tanh(), nn.Linear(32, 1))
    nn.init.normal_(numbers[2].weight, std=0.2)
    return Log(weights, latents, effects, strengths, numbers)


def eager_model(log: Log) -> DLRM:
    """TorchRec's DLRM over the log's rows, as its user would build it."""
    tables = [
        EmbeddingBagConfig(name=f, embedding_dim=DIM, num_embeddings=log.weights_FND.shape[1], feature_names=[f])
        for f in FEATURES
    ]
    model = DLRM(EmbeddingBagCollection(tables=tables), NUM_DENSE, BOTTOM, OVER).eval()
    with torch.no_grad():
        for index, name in enumerate(FEATURES):
            model.sparse_arch.embedding_bag_collection.embedding_bags[name].weight.copy_(log.weights_FND[index])
    return model


def train_head(head: Head, log: Log, samples: int, batch: int = 1024, rate: float = 1e-3, seed: int = 1) -> None:
    """One pass over freshly drawn samples, in bf16 products."""
    generator = torch.Generator().manual_seed(seed)
    steps = samples // batch
    optimizer = torch.optim.Adam(head.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    head.train()
    head.autocast = torch.bfloat16
    for _ in range(steps):
        dense, ids, labels = log.draw(batch, generator)
        loss = F.binary_cross_entropy_with_logits(head(dense, log.looked_up(ids)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.autocast = None
    head.eval()
