"""What shards a ranker's tables, and what their pooled embeddings travel in.

TorchRec's sharder, with row-wise tables on CPU as well, batches of unequal rows, and quantized communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import (
    CommOp,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from trainer.errors import ConfigError

GRADIENT_SCALE = 2.0**14  # a gradient of a mean over the batch lies below what fp16 can tell from 0
INT8_BLOCK = 32  # values that share a scale (fbgemm_gpu.quantize_comm.QuantizationContext)
INT8_ROWS = INT8_BLOCK // 4  # dims are multiples of 4


class FilledBatches(ShardedEmbeddingBagCollection):
    """Takes batches of any number of rows, where what carries the embeddings wants certain numbers of them.

    Gloo's all-gather of row-wise tables' gradients wants as many rows from each rank (`even`); int8 goes in blocks of
    INT8_BLOCK values, so that rows come by INT8_ROWS. Batches are filled with empty bags; what comes out is cut back.
    """

    even = False
    multiple = 1

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """Send ids where their rows are, in a batch filled up; TorchRec's pipeline calls this a step ahead."""
        rows = features.stride()
        wanted = torch.tensor([-(-rows // self.multiple) * self.multiple])
        if self.even:
            dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._env.process_group)
        ctx.local_rows = rows
        return super().input_dist(ctx, filled_up(features, int(wanted)))

    def compute_and_output_dist(self, ctx: Any, input: Any) -> LazyAwaitable[KeyedTensor]:  # noqa: A002
        """Pooled embeddings (B local rows, D) of this rank's rows."""
        return FirstRows(super().compute_and_output_dist(ctx, input), ctx.local_rows)


class FirstRows(LazyAwaitable[KeyedTensor]):
    """The first rows of pooled embeddings that are still on their way."""

    def __init__(self, pooled: LazyAwaitable[KeyedTensor], rows: int) -> None:
        super().__init__()
        self.pooled = pooled
        self.rows = rows

    def _wait_impl(self) -> KeyedTensor:
        pooled = self.pooled.wait()
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), pooled.values()[: self.rows])


def filled_up(features: KeyedJaggedTensor, rows: int) -> KeyedJaggedTensor:
    """The same bags, and empty ones after them until each feature has `rows`."""
    lengths = features.lengths().view(len(features.keys()), -1)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=nn.functional.pad(lengths, (0, rows - features.stride())).view(-1),
    )


class Sharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding on CPU too: TorchRec trains it there over gloo, only its planner leaves it out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types the planner may choose from."""
        types = super().sharding_types(compute_device_type)
        row_wise = ShardingType.ROW_WISE.value
        return types if row_wise in types else [*types, row_wise]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """TorchRec's sharded collection, or one that fills batches up where the communication wants it."""
        codecs = (self.qcomm_codecs_registry or {}).get(CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name)
        int8 = codecs is not None and codecs.forward.quantized_dtype == torch.uint8
        by_row = any(p.sharding_type == ShardingType.ROW_WISE.value for p in params.values())
        on_gloo = by_row and device is not None and device.type == "cpu"
        if env.world_size == 1 or not (int8 or on_gloo):
            return super().shard(module, params, env, device, module_fqn)
        sharded = FilledBatches(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        sharded.even = on_gloo
        sharded.multiple = INT8_ROWS if int8 else 1
        return sharded


def sharders(comms: str = "fp32", device: torch.device | str = "cpu") -> list[EmbeddingBagCollectionSharder]:
    """What shards a ranker's tables. `comms`: precision in which pooled embeddings and their gradients travel.

    int8 is for embeddings that go all-to-all; their gradients, and the sums of row-wise tables, which FBGEMM cannot
    scatter in int8, go as fp16 (bf16 on GPUs).
    Raises: ConfigError for bf16 on CPU, where TorchRec would quietly send fp16.
    """
    kind = torch.device(device).type
    if comms == "fp32":
        return [Sharder()]
    if comms == "bf16" and kind == "cpu":
        raise ConfigError("train.sharding.comms bf16: gloo carries no bf16 on CPU: use fp16, int8 or fp32")
    half = CommType.BF16 if comms == "bf16" or (comms == "int8" and kind == "cuda") else CommType.FP16
    to_all = [CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL]
    registry = {
        **_codecs(CommType(comms), half, to_all, kind),
        **_codecs(half, half, [CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER], kind),
    }
    return [Sharder(qcomm_codecs_registry=registry)]


def _codecs(forward: CommType, backward: CommType, ops: list[CommOp], kind: str) -> dict[str, QuantizedCommCodecs]:
    config = QCommsConfig(forward_precision=forward, backward_precision=backward)
    registry = get_qcomm_codecs_registry(config, comm_ops=ops, device=torch.device(kind)) or {}
    if backward == CommType.FP16:
        for codecs in registry.values():
            codecs.backward = ScaledFp16(SparseType.FP16, is_fwd=False)
    return registry


class ScaledFp16(QuantizedCommCodec):
    """Gradients in fp16, scaled. FBGEMM's own `loss_scale` divides while still in fp16, where they vanish after all."""

    def encode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """Gradients as they travel."""
        return super().encode(input_tensor * GRADIENT_SCALE, ctx)

    def decode(self, input_tensor: Tensor, ctx: QuantizationContext | None = None) -> Tensor:
        """Gradients as they were, in fp32."""
        return super().decode(input_tensor, ctx) / GRADIENT_SCALE
