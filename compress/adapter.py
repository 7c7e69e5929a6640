"""A TorchRec model that was trained elsewhere -> what `slimrank` compresses: docs/adapter.md tells it as a story.

In: a run (its `data` section says what the log's columns are), the state dict of a module with an
EmbeddingBagCollection, and the head, as ONNX bytes or as the state dict of one of our own heads. Out: a folder

    run.yaml      the run, for `data prepare --config`: no id is learned from the log
    start/        the transform, for `data prepare --continue-from`: ids are rows of the given tables
    checkpoint/   the weights, for compress, tune and evaluate

Row 0 of a table (unknown ids) becomes the mean of its rows, row 1 (missing values, empty bags) zero as in TorchRec;
row i of the given table becomes row i + 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from compress.errors import PlanError
from compress.onnx_head import ONNX_HEAD, OnnxHead
from trainer.checkpoint import Position, save_checkpoint
from trainer.config import RunConfig, dump_run, parse_run
from trainer.data.schema import NumericFeature, TableOptions
from trainer.data.transform import RESERVED_ROWS, IdMap, NumericStats, TableInfo, Transform, hash_ids
from trainer.files import new_directory, write_text
from trainer.models import build_head

NEVER = 2**62  # an id of the log is learned when it was seen this often
FLOAT_MAX = float(np.finfo(np.float32).max)


def adopt(
    out: Path,
    run: RunConfig,
    state: Mapping[str, Tensor],
    head: bytes | Mapping[str, Tensor],
    ids: Mapping[str, Sequence[Any]] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write a model into the folder `out`; returns the paths of run, start and checkpoint.

    `state` holds `...embedding_bags.NAME.weight` (rows, dim) float for each table; `names` says which NAME a table of
    the schema has there, its own by default. `ids` gives the raw id of each row of a table; without it the log holds
    row numbers. `head` is an ONNX model (dense (B, I), looked up (B, L)) -> logits (B, T), or a state dict of the run's
    `model.arch`; the looked-up embeddings come in the order of the schema's features.
    Raises: PlanError naming the table or feature that cannot be taken over; SlimrankError when `out` holds something.
    """
    weights = {t: _weight(state, (names or {}).get(t, t)) for t in _table_names(run)}
    run = _with_dims(run, weights)
    transform = _transform(run, weights, ids or {})
    tensors = {f"tables/{name}/weight": _with_reserved_rows(weight) for name, weight in weights.items()}
    tensors |= {f"dense/head.{key}": value for key, value in _head_state(run, transform, head).items()}
    with new_directory(Path(out)) as staging:
        (staging / "start").mkdir()
        transform.save(staging / "start")
        write_text(staging / "run.yaml", dump_run(run))  # JSON is YAML
        header = {
            "run": run.model_dump(mode="json"),
            "fingerprint": transform.fingerprint(),
            "table_dims": run.table_dims(),
            "position": asdict(Position()),
            "metrics": {},
            "plan": {},
            "precision": "fp32",
            "world_size": 1,
        }
        save_checkpoint(staging / "checkpoint", tensors, header, rank=0, world_size=1)
    out = Path(out).absolute()
    return {"run": out / "run.yaml", "start": out / "start", "checkpoint": out / "checkpoint"}


def _table_names(run: RunConfig) -> list[str]:
    for feature in run.data.features:
        if isinstance(feature, NumericFeature) and feature.transform != "none":
            raise PlanError(f"feature {feature.name!r}: transform {feature.transform}: give numbers as the model reads "
                            f"them, and transform: none")  # fmt: skip
        if isinstance(feature, TableOptions) and feature.hash_size is not None:
            raise PlanError(
                f"feature {feature.name!r}: hash_size is slimrank's own hash: give row numbers of the table"
            )
    return [f.name for f in run.data.sparse_features if f.table_name == f.name]


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    found = [k for k in state if k == f"{name}.weight" or k.endswith(f"embedding_bags.{name}.weight")]
    if len(found) != 1:
        raise PlanError(f"table {name!r}: {len(found)} tensors of the state dict end in embedding_bags.{name}.weight: "
                        f"name the right one in `names`")  # fmt: skip
    weight = state[found[0]].detach().cpu().float()
    if weight.dim() != 2 or not len(weight) or not torch.isfinite(weight).all():
        raise PlanError(f"table {name!r}: {tuple(weight.shape)}: needs (rows, dim) of finite numbers")
    return weight


def _with_dims(run: RunConfig, weights: Mapping[str, Tensor]) -> RunConfig:
    """The run, its tables as wide as the weights, and no id learned from the log."""
    content = run.model_dump(mode="json")
    content["data"]["min_count"] = NEVER
    for feature in content["data"]["features"]:
        if feature["name"] in weights:
            feature |= {"dim": weights[feature["name"]].shape[1], "min_count": None}
    return parse_run(content, "adopted run")


def _transform(run: RunConfig, weights: Mapping[str, Tensor], ids: Mapping[str, Sequence[Any]]) -> Transform:
    infos, id_maps = {}, {}
    for name, weight in weights.items():
        rows, dim = weight.shape
        keys, missing = hash_ids(pa.array(ids.get(name, range(rows))), name)
        if len(keys) != rows or missing.any() or len(np.unique(keys)) != rows:
            raise PlanError(f"table {name!r}: {len(keys)} ids for {rows} rows: give each row one id of its own")
        readers = tuple(f.name for f in run.data.sparse_features if f.table_name == name)
        infos[name] = TableInfo(name, "vocabulary", rows + RESERVED_ROWS, dim, readers)
        id_maps[name] = IdMap.of_rows(keys)
    numerics = {f.name: NumericStats(0.0, 1.0, -FLOAT_MAX, FLOAT_MAX, False) for f in run.data.dense_features}
    return Transform(run.data, infos, id_maps, numerics)


def _with_reserved_rows(weight_ND: Tensor) -> Tensor:
    reserved = torch.stack([weight_ND.mean(dim=0), torch.zeros(weight_ND.shape[1])])
    return torch.cat([reserved, weight_ND])


def _head_state(run: RunConfig, transform: Transform, head: bytes | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(head, bytes):
        content = torch.from_numpy(np.frombuffer(head, dtype=np.uint8).copy())
        width = sum(transform.table_of(f).embedding_dim * (transform.positions(f) or 1) for f in transform.sparse)
        logits = OnnxHead(content)(torch.zeros(2, len(transform.dense_names)), torch.zeros(2, width))
        if logits.shape[1] != len(run.data.tasks):
            raise PlanError(f"head: {logits.shape[1]} logits a row, the schema has {len(run.data.tasks)} tasks")
        return {ONNX_HEAD: content}
    wanted = build_head(run.model, transform).state_dict()
    for key in {**wanted, **head}:
        if key not in wanted or key not in head or wanted[key].shape != head[key].shape:
            raise PlanError(f"head: {key} is not that of model.arch {run.model.arch}: give its state dict, or ONNX")
    return dict(head)
