"""Checkpoints: save by all ranks, verify, load under any plan and any number of workers.

    DIR/checkpoint.json          run, fingerprint of the data, position, metrics, plan; where each part lies; sha256s
    DIR/rank-00000.safetensors   the table rows and optimizer state that rank 0 owned, ...
    DIR/dense.safetensors        the dense part and its optimizer state

Tensors have names of their own (tables/T/weight, tables/T/momentum1, dense/P, dense_optimizer/P/S), so nothing of the
plan is in them but the rectangles they were cut into; a reader takes any rows of any table without reading the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from trainer.config import RunConfig, parse_run
from trainer.errors import CheckpointError
from trainer.files import sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
READ_ROWS = 1 << 20


@dataclass(frozen=True)
class Position:
    """Where training stands: the next global batch to take, and what early stopping remembers."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0
    best_ne: float = float("inf")
    stale_evals: int = 0


# -- the state of a training run, under canonical names --------------------------------------------------------------


def training_state(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Tensor | ShardedTensor]:
    """Every tensor of a run; parts are views of live storage, so writing into them loads it."""
    state: dict[str, Tensor | ShardedTensor] = {}
    for key, value in model.state_dict().items():
        table = _table_of(key)
        state[f"tables/{table}/weight" if table else f"dense/{key}"] = value
    for key, slots in optimizer.state_dict()["state"].items():
        kind, _, parameter = key.partition(".")
        for slot, value in slots.items():
            name = slot.rpartition(".")[2]
            table = _table_of(parameter)
            if kind == "tables" and table:
                state[f"tables/{table}/{name}"] = value
            else:
                state[f"dense_optimizer/{parameter}/{name}"] = value
    return state


def _table_of(key: str) -> str | None:
    """The table T that a state key such as embeddings.embedding_bags.t_T.weight speaks of."""
    _, marker, rest = key.partition("embedding_bags.t_")
    return rest.removesuffix(".weight") if marker else None


def init_optimizer_state(optimizer: CombinedOptimizer) -> None:
    """Make the dense optimizer's lazy state exist, so that it can be saved and loaded before the first step."""
    for _, part in optimizer.optimizers:
        for group in part.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, torch.nn.Parameter) and parameter not in part.state and "betas" in group:
                    part.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    }


# -- save ------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, state: Mapping[str, Tensor | ShardedTensor], header: Mapping[str, Any], rank: int, world_size: int
) -> None:
    """Write this rank's part of a checkpoint; all ranks call it together, each with its own or a common folder.

    Rank 0 writes the manifest, with the parts and checksums that the others told it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    file_name = f"rank-{rank:05d}.safetensors"
    for key, value in state.items():
        if isinstance(value, ShardedTensor):
            entry: dict[str, Any] = {"shape": list(value.size()), "parts": []}
            for shard in value.local_shards():
                offsets = [int(o) for o in shard.metadata.shard_offsets]
                name = f"{key}@{','.join(map(str, offsets))}"
                own[name] = shard.tensor.detach().cpu().contiguous()
                entry["parts"].append(
                    {"file": file_name, "name": name, "offsets": offsets, "sizes": list(shard.tensor.shape)}
                )
        else:
            entry = {"shape": list(value.shape), "parts": []}
            if rank == 0:
                dense[key] = value.detach().cpu().contiguous()
                zeros = [0] * value.dim()
                entry["parts"].append(
                    {"file": "dense.safetensors", "name": key, "offsets": zeros, "sizes": list(value.shape)}
                )
        entries[key] = entry
    sums = {}
    if own:
        save_file(own, folder / file_name)
        sums[file_name] = sha256(folder / file_name)
    if rank == 0:
        save_file(dense, folder / "dense.safetensors")
        sums["dense.safetensors"] = sha256(folder / "dense.safetensors")
    told: list[tuple[dict, dict] | None] = [(entries, sums)]
    if world_size > 1:
        told = [None] * world_size
        dist.all_gather_object(told, (entries, sums))
    if rank == 0:
        tensors: dict[str, dict[str, Any]] = {}
        files: dict[str, str] = {}
        for part in told:
            assert part is not None
            files.update(part[1])
            for key, entry in part[0].items():
                tensors.setdefault(key, {"shape": entry["shape"], "parts": []})["parts"] += entry["parts"]
        manifest = {"format_version": FORMAT_VERSION, **header, "tensors": tensors, "files": files}
        write_json(folder / MANIFEST, manifest)


# -- read ------------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened checkpoint: its header, and any rows of any tensor."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.run: RunConfig = parse_run(manifest["run"], str(folder / MANIFEST))
        self.fingerprint: str = manifest["fingerprint"]
        self.metrics: dict[str, Any] = manifest["metrics"]
        self.position = Position(**manifest["position"])
        self._open: dict[str, Any] = {}

    @property
    def version(self) -> str:
        """A short name of exactly these weights: the digest of the files' checksums."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()[:12]

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with `prefix`."""
        return [k for k in self.manifest["tensors"] if k.startswith(prefix)]

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(self.manifest["tensors"][key]["shape"])

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first..last of a tensor (all of it by default), whatever parts it lies in."""
        shape = self.shape(key)
        if not shape:
            part = self.manifest["tensors"][key]["parts"][0]
            return self._file(part["file"]).get_tensor(part["name"])
        last = shape[0] if last is None else last
        out = None
        for part in self.manifest["tensors"][key]["parts"]:
            begin, size = part["offsets"][0], part["sizes"][0]
            low, high = max(first, begin), min(last, begin + size)
            if low >= high:
                continue
            rows = self._file(part["file"]).get_slice(part["name"])[low - begin : high - begin]
            if out is None:
                out = torch.empty((last - first, *shape[1:]), dtype=rows.dtype)
            where: list[slice] = [slice(low - first, high - first)]
            where += [slice(o, o + s) for o, s in zip(part["offsets"][1:], part["sizes"][1:], strict=True)]
            out[tuple(where)] = rows
        return torch.empty((0, *shape[1:])) if out is None else out

    def table_rows(self, table: str, rows: np.ndarray) -> Tensor:
        """Chosen rows (sorted, distinct) of a table's weight, read in chunks: memory is theirs and one chunk's."""
        key = f"tables/{table}/weight"
        total = self.shape(key)[0]
        parts = []
        for first in range(0, total, READ_ROWS):
            last = min(first + READ_ROWS, total)
            low, high = np.searchsorted(rows, (first, last))
            if low < high:
                parts.append(self.read(key, first, last)[torch.from_numpy(rows[low:high] - first)])
        return torch.cat(parts) if parts else torch.empty((0, self.shape(key)[1]))

    def table_chunks(self, table: str) -> Iterator[tuple[int, Tensor]]:
        """A table's weight in row chunks: (first row, rows)."""
        key = f"tables/{table}/weight"
        total = self.shape(key)[0]
        for first in range(0, total, READ_ROWS):
            yield first, self.read(key, first, min(first + READ_ROWS, total))

    def dense_state(self) -> dict[str, Tensor]:
        """The head's state dict."""
        prefix = "dense/head."
        return {key.removeprefix(prefix): self.read(key) for key in self.keys(prefix)}

    def verify(self) -> None:
        """Raises: CheckpointError naming the first file that is absent or differs from what was written."""
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            if not path.exists():
                raise CheckpointError(f"{path}: missing from the checkpoint: restore it, or use another checkpoint")
            if sha256(path) != expected:
                raise CheckpointError(f"{path}: altered since it was written: use another checkpoint")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: cannot be read: {error}") from None
        return self._open[name]


def resolve(path: Path) -> Path:
    """A checkpoint's folder: the path itself, or the best checkpoint of the training run at that path.

    Raises: CheckpointError when it is neither.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).exists():
        return path
    try:
        best = path / json.loads((path / "train.json").read_text(encoding="utf-8"))["best"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise CheckpointError(
            f"{path}: not a checkpoint: give the folder that 'train' wrote, or one inside it"
        ) from None
    if not (best / MANIFEST).exists():
        raise CheckpointError(f"{best}: the run's best checkpoint is gone: give another one")
    return best


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open and verify a checkpoint.

    Raises: CheckpointError when it is none, is of another format, or its files are not what was written.
    """
    folder = resolve(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{folder}: format {manifest['format_version']}, this version reads {FORMAT_VERSION}")
        checkpoint = Checkpoint(folder, manifest)
        if not (isinstance(manifest["files"], dict) and isinstance(manifest["tensors"], dict)):
            raise TypeError("files and tensors are mappings")
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a checkpoint manifest ({type(error).__name__})") from None
    if verify:
        checkpoint.verify()
    return checkpoint


def load_into(state: Mapping[str, Tensor | ShardedTensor], checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into live state; each rank reads only the rows it owns.

    Raises: CheckpointError when tensors are missing or of another shape.
    """
    missing = sorted(set(state) - set(checkpoint.keys()))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: lacks {missing[0]} and {len(missing) - 1} more of this model")
    with torch.no_grad():
        for key, value in state.items():
            shape = tuple(value.size())
            if shape != checkpoint.shape(key):
                raise CheckpointError(f"{checkpoint.folder}: {key} is {checkpoint.shape(key)}, this model has {shape}")
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    begin, size = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                    rows = checkpoint.read(key, begin[0], begin[0] + size[0])
                    columns = tuple(slice(o, o + s) for o, s in zip(begin[1:], size[1:], strict=True))
                    shard.tensor.copy_(rows[(slice(None), *columns)])
            else:
                value.copy_(checkpoint.read(key))
