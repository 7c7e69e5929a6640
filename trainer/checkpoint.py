"""Checkpoints: save by all ranks, verify, load under any plan and any number of workers.

    DIR/checkpoint.json          run, fingerprint of the data, position, metrics, plan; where each part lies; sha256s
    DIR/rank-00000.safetensors   the table rows and optimizer state that rank 0 owned, ...
    DIR/dense.safetensors        the dense part and its optimizer state; data-parallel tables

All ranks write into one hidden folder beside DIR, which becomes DIR by one rename once every file is on disk: a
checkpoint is whole or absent, and a full disk or a kill leaves the ones before it as they were.

Tensors have names of their own (tables/T/weight, tables/T/momentum1, dense/P, dense_optimizer/P/S), so nothing of the
plan is in them but the rectangles they were cut into; a reader takes any rows of any table without reading the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from trainer.config import RunConfig, parse_run
from trainer.data.transform import OOV_ROW
from trainer.errors import CheckpointError
from trainer.files import sha256, write_json
from trainer.ranks import from_all, from_first
from trainer.storage import Location, location, remote_sha256, size_of, why_absent
from trainer.tensor_files import TensorFile, open_tensors

FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
READ_ROWS = 1 << 20
WRITE_BYTES = 16 << 20
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",  # a head that was exported elsewhere
}


@dataclass(frozen=True)
class Position:
    """Where training stands: the next global batch to take, what its schedule and early stopping remember.

    `seen` is the digest of the rows of this epoch that have reached the weights (trainer/data/reader.py, row_digest):
    at the epoch's end it tells whether each was seen exactly once, kills and resumes included.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    best_ne: float = float("inf")
    stale_evals: int = 0
    lr_scale: float = 1.0
    stale_lr: int = 0
    seen: int = 0


# -- the state of a training run, under canonical names --------------------------------------------------------------


def training_state(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Tensor | ShardedTensor]:
    """Every tensor of a run; parts are views of live storage, so writing into them loads it."""
    state = training_state_of(model)
    for key, slots in optimizer.state_dict()["state"].items():
        _, _, parameter = key.partition(".")
        for slot, value in slots.items():
            name = slot.rpartition(".")[2]
            table = _table_of(parameter)
            if table:
                state[f"tables/{table}/{name}"] = value
            else:
                state[f"dense_optimizer/{parameter}/{name}"] = value
    return state


def training_state_of(model: torch.nn.Module) -> dict[str, Any]:
    """A model's own tensors, sharded or whole, under canonical names; views of live storage."""
    state = {}
    for key, value in model.state_dict().items():
        table = _table_of(key)
        state[f"tables/{table}/weight" if table else f"dense/{key}"] = value
    return state


def _table_of(key: str) -> str | None:
    """The table T that a state key such as embeddings.embedding_bags.t_T.weight speaks of."""
    _, marker, rest = key.partition("embedding_bags.t_")
    return rest.removesuffix(".weight") if marker else None


def init_optimizer_state(optimizer: CombinedOptimizer) -> None:
    """Make lazy optimizer state exist, so that it can be saved and loaded before the first step."""
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
    """Write a checkpoint; all ranks call it together with one folder that they share.

    Each rank writes its own part, rank 0 the manifest with what the others told it, and renames it into place.
    Raises: CheckpointError on every rank when one could not write; nothing is left behind then.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    told: tuple[dict, dict, str | None]
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
    if world_size > 1:
        dist.barrier()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        told = (*_write_parts(partial, state, rank), None)
    except OSError as error:
        told = ({}, {}, f"{folder}: rank {rank} cannot write the checkpoint: {error}")
    gathered = from_all(told, world_size)
    problem = next((p[2] for p in gathered if p[2] is not None), None)
    if rank == 0 and problem is None:
        try:
            _commit(partial, folder, header, gathered)
        except OSError as error:
            problem = f"{folder}: cannot write the checkpoint: {error}"
    if rank == 0 and problem is not None:
        shutil.rmtree(partial, ignore_errors=True)
    problem = from_first(problem, world_size)
    if problem is not None:
        raise CheckpointError(f"{problem}: free space or choose another --out, then go on with --resume")


def _commit(partial: Path, folder: Path, header: Mapping[str, Any], gathered: list[Any]) -> None:
    """Write the manifest of what all ranks wrote, and give the folder its name."""
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, str] = {}
    for entries, sums, _ in gathered:
        files.update(sums)
        for key, entry in entries.items():
            tensors.setdefault(key, {"shape": entry["shape"], "parts": []})["parts"] += entry["parts"]
    manifest = {"format_version": FORMAT_VERSION, **header, "tensors": tensors, "files": files}
    write_json(partial / MANIFEST, {**manifest, "digest": _digest(manifest)})
    if folder.exists():  # written before, by a run that was killed before it could say so
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file straight from the tensors' memory, and return its sha256; it is on disk on return.

    The library's writer first copies each tensor, which doubles a worker's memory, and leaves hashing to a second read.
    """
    layout: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        layout[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: Any) -> None:
            view = memoryview(data)
            for first in range(0, len(view), WRITE_BYTES):
                chunk = view[first : first + WRITE_BYTES]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]

        put(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            if tensor.numel():
                put(tensor.reshape(-1).view(torch.uint8).numpy())
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_parts(folder: Path, state: Mapping[str, Tensor | ShardedTensor], rank: int) -> tuple[dict, dict]:
    """Write what this rank owns; where each part lies, and the checksum of each file."""
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
        sums[file_name] = write_tensors(folder / file_name, own)
    if rank == 0:
        sums["dense.safetensors"] = write_tensors(folder / "dense.safetensors", dense)
    return entries, sums


# -- read ------------------------------------------------------------------------------------------------------------


class Checkpoint:
    """An opened checkpoint: its header, and any rows of any tensor, on this machine or in a storage."""

    def __init__(self, folder: Location, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.run: RunConfig = parse_run(manifest["run"], str(folder / MANIFEST))
        self.fingerprint: str = manifest["fingerprint"]
        self.metrics: dict[str, Any] = manifest["metrics"]
        self.position = Position(**manifest["position"])
        self._open: dict[str, TensorFile] = {}

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
            return self._file(part["file"]).whole(part["name"])
        last = shape[0] if last is None else last
        out = None
        for part in self.manifest["tensors"][key]["parts"]:
            begin, size = part["offsets"][0], part["sizes"][0]
            low, high = max(first, begin), min(last, begin + size)
            if low >= high:
                continue
            rows = self._file(part["file"]).rows(part["name"], low - begin, high - begin)
            if out is None:
                out = torch.empty((last - first, *shape[1:]), dtype=rows.dtype)
            where: list[slice] = [slice(low - first, high - first)]
            where += [slice(o, o + s) for o, s in zip(part["offsets"][1:], part["sizes"][1:], strict=True)]
            out[tuple(where)] = rows
        return torch.empty((0, *shape[1:])) if out is None else out

    def table_rows(self, table: str, rows: np.ndarray) -> Tensor:
        """Chosen rows (distinct, in any order) of a table's weight: memory is theirs, and the others are not read."""
        key = f"tables/{table}/weight"
        out = None
        order = np.argsort(rows, kind="stable")
        ordered, place = rows[order], torch.from_numpy(order)
        for part in self.manifest["tensors"][key]["parts"]:
            (begin, column), (size, columns) = part["offsets"], part["sizes"]
            low, high = np.searchsorted(ordered, (begin, begin + size))
            if low == high:
                continue
            taken = self._file(part["file"]).take(part["name"], ordered[low:high] - begin)
            if out is None:
                out = torch.empty((len(rows), self.shape(key)[1]), dtype=taken.dtype)
            out[place[low:high], column : column + columns] = taken
        return torch.empty((0, self.shape(key)[1])) if out is None else out

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

    def describe(self) -> dict[str, Any]:
        """What is inside, as JSON values: where training stood, each table, its plan, sizes and metrics."""
        tensors, plan = self.manifest["tensors"], self.manifest["plan"]
        names = dict.fromkeys(key.split("/")[1] for key in self.keys("tables/"))
        tables = {}
        for name in names:
            keys = self.keys(f"tables/{name}/")
            rows, dim = self.shape(f"tables/{name}/weight")
            tables[name] = {
                "num_embeddings": rows,
                "embedding_dim": dim,
                "bytes": sum(math.prod(self.shape(key)) * 4 for key in keys),
                "state": sorted(key.split("/")[2] for key in keys if not key.endswith("/weight")),
                "sharding_type": plan.get(name, {}).get("sharding_type"),
                "parts": len(tensors[f"tables/{name}/weight"]["parts"]),
            }
        head = {key: list(self.shape(key)) for key in self.keys("dense/")}
        train = self.run.train
        return {
            "checkpoint": str(self.folder),
            "version": self.version,
            "name": self.run.name,
            "arch": self.run.model.arch,
            "position": asdict(self.position),
            "metrics": self.metrics,
            "fingerprint": self.fingerprint,
            "continues": self.manifest.get("continues"),
            "world_size": self.manifest["world_size"],
            "table_optimizer": train.table_optimizer,
            "dense_optimizer": train.dense_optimizer,
            "precision": self.manifest["precision"],
            "tables": tables,
            "dense_parameters": sum(math.prod(shape) for shape in head.values()),
            "bytes": sum(size_of(self.folder / name) for name in self.manifest["files"]),
            "files": self.manifest["files"],
        }

    def check_whole(self) -> None:
        """Raises: CheckpointError where an earlier stage wrote it: its tables are narrower than the model's."""
        if self.manifest["table_dims"] != self.run.table_dims():
            raise CheckpointError(
                f"{self.folder}: of an earlier training stage, whose tables are narrower: use one of the last stage"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Raises: CheckpointError naming the first file that is absent or differs from what was written.

        Looks at every `parts`-th file from `part` on, so that ranks can share the work.
        """
        for name, expected in list(self.manifest["files"].items())[part::parts]:
            path = self.folder / name
            if not path.exists():
                raise CheckpointError(f"{path}: missing from the checkpoint: restore it, or use another checkpoint")
            if (sha256(path) if isinstance(path, Path) else remote_sha256(path)) != expected:
                raise CheckpointError(f"{path}: altered since it was written: use another checkpoint")

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = open_tensors(self.folder / name)
        return self._open[name]


def resolve(path: str | Location) -> Location:
    """A checkpoint's place: the path or URI itself, or the best checkpoint of the training run there.

    Raises: CheckpointError when it is neither.
    """
    path = location(path)
    if (path / MANIFEST).exists():
        return path
    record = path / "train.json"
    try:
        if not record.exists():
            raise FileNotFoundError
        best = path / json.loads(record.read_text(encoding="utf-8"))["best"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        why = why_absent(path, MANIFEST)
        raise CheckpointError(
            f"{path}: not a checkpoint{why}: give the folder that 'train' wrote, or one inside it"
        ) from None
    if not (best / MANIFEST).exists():
        raise CheckpointError(f"{best}: the run's best checkpoint is gone: give another one")
    return best


def open_checkpoint(path: str | Location, *, verify: bool = True) -> Checkpoint:
    """Open and verify a checkpoint, which is read where it lies.

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
        if manifest.get("digest") != _digest(manifest):
            raise CheckpointError(f"{folder / MANIFEST}: altered since it was written: use another checkpoint")
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a checkpoint manifest ({type(error).__name__})") from None
    if verify:
        checkpoint.verify()
    return checkpoint


def verify_together(checkpoint: Checkpoint, rank: int, world_size: int) -> None:
    """Verify a checkpoint's files, shared out over the ranks.

    Raises: CheckpointError on every rank when one finds a file absent or altered.
    """
    problem = None
    try:
        checkpoint.verify(rank, world_size)
    except CheckpointError as error:
        problem = str(error)
    found = next((p for p in from_all(problem, world_size) if p is not None), None)
    if found is not None:
        raise CheckpointError(found)


def load_into(state: Mapping[str, Tensor | ShardedTensor], checkpoint: Checkpoint, *, grow: bool = False) -> None:
    """Copy a checkpoint into live state; each rank reads only the rows it owns.

    With `grow`, tables may have more rows or columns than the checkpoint's: a row that the checkpoint lacks starts as
    its out-of-vocabulary row (so that a new id scores as it did when it was unknown), a column keeps the value it has,
    and their optimizer state starts at zero.
    Raises: CheckpointError when tensors are missing or of another shape.
    """
    missing = sorted(set(state) - set(checkpoint.keys()))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: lacks {missing[0]} and {len(missing) - 1} more of this model")
    with torch.no_grad():
        for key, value in state.items():
            shape, stored = tuple(value.size()), checkpoint.shape(key)
            larger = len(shape) == len(stored) and all(a >= b for a, b in zip(shape, stored, strict=True))
            if shape != stored and not (grow and larger and key.startswith("tables/")):
                raise CheckpointError(f"{checkpoint.folder}: {key} is {stored}, this model has {shape}")
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    _load_block(shard.tensor, shard.metadata.shard_offsets, key, checkpoint)
            else:
                _load_block(value, [0] * len(shape), key, checkpoint)


def _load_block(block: Tensor, offsets: list[int], key: str, checkpoint: Checkpoint) -> None:
    """Fill a block of a tensor, whose first element lies at `offsets` in the whole, a chunk of rows at a time."""
    if not block.dim():
        block.copy_(checkpoint.read(key))
        return
    stored = checkpoint.shape(key)
    columns = tuple(
        slice(o, max(min(o + s, n), o)) for o, s, n in zip(offsets[1:], block.shape[1:], stored[1:], strict=True)
    )
    inside = tuple(slice(0, c.stop - c.start) for c in columns)
    for first in range(0, block.shape[0], READ_ROWS):
        begin, end = offsets[0] + first, offsets[0] + min(first + READ_ROWS, block.shape[0])
        known = max(min(end, stored[0]) - begin, 0)
        if known:
            rows = checkpoint.read(key, begin, begin + known)
            block[(slice(first, first + known), *inside)] = rows[(slice(None), *columns)].to(block.device)
        if known < end - begin and key.endswith("/weight"):
            unknown = checkpoint.read(key, OOV_ROW, OOV_ROW + 1)
            block[(slice(first + known, end - offsets[0]), *inside)] = unknown[(slice(None), *columns)].to(block.device)
