"""The shape all rankers share: embedding tables -> looked-up embeddings -> a dense head -> one logit a task.

Legend: B batch, I dense inputs, L sum of the lookups' widths, D sum of the features' embedding dims, T tasks.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from trainer.data.batch import Batch, lookup_names


@dataclass(frozen=True)
class HeadShape:
    """What a head takes and gives: I dense inputs, the embedding dim of each sparse feature in order, T tasks.

    `positions` holds, of each feature, the length of its sequence where attention pools it, else None; `targets` the
    place of the feature it attends to.
    """

    num_dense: int
    dims: tuple[int, ...]
    num_tasks: int
    features: tuple[str, ...] = ()
    positions: tuple[int | None, ...] = ()
    targets: tuple[int | None, ...] = ()

    @property
    def total_dim(self) -> int:
        """D: width of the concatenated pooled embeddings."""
        return sum(self.dims)

    @property
    def starts(self) -> list[int]:
        """The first column of each feature among the concatenated pooled embeddings."""
        return [0, *itertools.accumulate(self.dims[:-1])]

    @property
    def lookups(self) -> list[tuple[str, int]]:
        """Each lookup's name and width, in order."""
        spread = zip(self.features, self.dims, self.positions, strict=True)
        return [(name, dim) for feature, dim, count in spread for name in lookup_names(feature, count)]


class Head(nn.Module, ABC):
    """The dense part of a ranker: (dense (B, I), looked up (B, L)) -> logits (B, T). No tables in it.

    `autocast` is the type its matrix products run in; None leaves them in fp32.
    """

    autocast: torch.dtype | None = None

    def forward(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """Logits (B, T) float32."""
        if self.autocast is None:
            return self.logits(dense_BI, looked_up_BL)
        with torch.autocast(dense_BI.device.type, self.autocast):
            return self.logits(dense_BI, looked_up_BL).float()

    @abstractmethod
    def logits(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """What an architecture computes."""

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:  # noqa: ARG002
        """All that reads what was looked up of one feature, by its place: Linear layers by name, and where it begins.

        Empty where anything but a Linear reads it, or where that is not known; else each reader is a submodule's name
        and the first of the feature's columns among its inputs. Compression then lets such a feature have fewer
        columns: this head built for a HeadShape of smaller `dims` must be the same but for the readers' inputs.
        """
        return []

    def cast(self, x: Tensor) -> Tensor:
        """What several layers read, in the type they multiply in: cast here once, not by each of them."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Ranker(nn.Module):
    """Tables and head. Training shards `embeddings`; compression replaces them by a quantized lookup.

    Tables may be narrower than the head expects (an early stage of progressive training): the rest reads as zero.
    """

    def __init__(self, embeddings: EmbeddingBagCollection, head: Head, shape: HeadShape) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.head = head
        self.lookups = shape.lookups
        dims = {f: c.embedding_dim for c in embeddings.embedding_bag_configs() for f in c.feature_names}
        self.width = sum(width for _, width in self.lookups)
        self.names = [name for name, _ in self.lookups]
        self.dims = [dims[name] for name in self.names]
        self.missing = [width - dims[name] for name, width in self.lookups]
        # a sequence counts as one feature in the L2 term, as the mean over its positions
        counts = [count or 1 for count in shape.positions for _ in range(count or 1)]
        features = len(shape.features)
        self.register_buffer(
            "l2_scale",
            torch.cat(
                [torch.full((dims[n],), 1.0 / features / c) for (n, _), c in zip(self.lookups, counts, strict=True)]
            ),
            persistent=False,
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, T), and the looked-up embeddings (B, L) that regularisation looks at."""
        looked_up_BL = in_order(self.embeddings(batch.sparse), self.names)
        whole_BL = widened(looked_up_BL, self.dims, self.missing) if any(self.missing) else looked_up_BL
        return self.head(batch.dense, whole_BL), looked_up_BL


@torch.fx.wrap  # TorchRec's pipeline traces the model, and need not look in here
def in_order(found: KeyedTensor, names: list[str]) -> Tensor:
    """All lookups (B, L) side by side; a sharded collection may have them in the order of its table groups.

    Split once, not sliced by name: the gradient of each slice would be a tensor of the whole's size.
    """
    if found.keys() == names:
        return found.values()
    parts = found.to_dict()
    return torch.cat([parts[name] for name in names], dim=1)


@torch.fx.wrap
def widened(looked_up_BL: Tensor, dims: list[int], missing: list[int]) -> Tensor:
    """Lookups of some dims, each followed by as many zeros as the head misses of it."""
    parts = zip(looked_up_BL.split(dims, dim=1), missing, strict=True)
    return torch.cat([F.pad(part, (0, zeros)) for part, zeros in parts], dim=1)


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch: the same result whatever the number of workers.

    Statistics are summed over ranks (torch's SyncBatchNorm does so on GPUs only). Inputs (B, W), outputs the same.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.momentum = momentum
        self.eps = eps

    def forward(self, x_BW: Tensor) -> Tensor:
        """Normalise by the global batch in training, by running statistics otherwise."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return torch.addcmul(self.bias - self.running_mean * scale, x_BW, scale)
        x_BW = x_BW.float()
        count = torch.full((1,), float(x_BW.shape[0]), device=x_BW.device)
        mean, rows = _global_sums(x_BW.sum(0), count)
        mean = mean / rows
        centred = x_BW - mean
        var, _ = _global_sums(centred.square().sum(0), count)
        var = var / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1).clamp(min=1), self.momentum)
        return centred * torch.rsqrt(var + self.eps) * self.weight + self.bias


def _global_sums(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and a count over all ranks; gradients flow to every rank's own part."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return sums, count
    both = torch.distributed.nn.functional.all_reduce(torch.cat([sums, count]))
    return both[:-1], both[-1:]


class Dropout(nn.Dropout):
    """torch's dropout, with cheap randomness on a CPU: 15 random bits a value, four values of one 64-bit draw.

    torch draws a number a value: at 4,096 x 400 that took 14 ms forward and 3 ms backward of a core, this 2.5 and .4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of the values; the others grow by what keeps the mean."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        return x * kept(x, self.p)


def kept(x: Tensor, p: float) -> Tensor:
    """Independent factors of mean 1, shaped and typed as `x`: 0 with probability `p`, taken as a multiple of 2**-15."""
    dropped = round(p * 2**15)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_().view(torch.int16)[: x.numel()]
    draws.bitwise_and_(2**15 - 1)  # random_ leaves each number's sign bit out
    stays = torch.ge(draws, dropped, out=torch.empty_like(draws))
    return stays.view(x.shape).to(x.dtype).mul_(2**15 / (2**15 - dropped))


def mlp(sizes: Sequence[int], dropout: float = 0.0, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers, each followed by batch norm where asked, ReLU and dropout."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if batch_norm:
            layers.append(BatchNorm(n_out))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(Dropout(dropout))
    return nn.Sequential(*layers)
