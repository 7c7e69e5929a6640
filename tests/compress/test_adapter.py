"""compress/adapter.py: a hand-written TorchRec model, trained elsewhere, is compressed and scores the same."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from compress_builders import prepare_here, quiet, write_log
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.adapter import adopt
from compress.artifact import load_artifact
from compress.compressor import compress, data_of
from compress.config import CompressionPlan, TablePlan
from compress.errors import ArtifactError, PlanError
from compress.model import model_of_checkpoint, score_split
from compress.onnx_head import OnnxHead
from compress.search.profile import profile_tables
from trainer.checkpoint import open_checkpoint
from trainer.config import RunConfig, load_run
from trainer.data.transform import load_transform
from trainer.models import build_head

ROWS, USERS, ITEMS = 1200, 300, 80


def table(name: str, dim: int, rows: int, features: list[str]) -> EmbeddingBagConfig:
    """A table pooled by sum."""
    return EmbeddingBagConfig(
        name=name, embedding_dim=dim, num_embeddings=rows, feature_names=features, pooling=PoolingType.SUM
    )


class TheirModel(nn.Module):
    """What somebody else wrote: tables of their own names, and a dense part that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                table("user_table", 16, USERS, ["user"]),
                table("item_table", 8, ITEMS, ["item", "recent"]),
            ]
        )
        self.over = TheirHead()

    def forward(self, dense: Tensor, ids: KeyedJaggedTensor) -> Tensor:
        return self.over(dense, self.ebc(ids).values())


class TheirHead(nn.Module):
    """Gated layers and a sine: nothing that slimrank has a class for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(34, 24), nn.Linear(34, 24), nn.Linear(24, 1)

    def forward(self, dense: Tensor, looked_up: Tensor) -> Tensor:
        x = torch.cat([dense, looked_up], dim=1)
        return self.out(torch.sigmoid(self.gate(x)) * torch.sin(self.value(x)))


def their_log(seed: int = 0) -> pa.Table:
    """Row numbers of their tables, numbers as their model reads them; some bags are empty."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)
    recent = [rng.integers(0, ITEMS, n).tolist() for n in rng.integers(0, 5, ROWS)]
    odds = np.sin(user) + np.cos(item)
    return pa.table(
        {
            "user": pa.array(user),
            "item": pa.array(item),
            "recent": pa.array(recent, pa.list_(pa.int64())),
            "hour": pa.array(rng.normal(0, 1, ROWS)),
            "price": pa.array(rng.normal(0, 1, ROWS)),
            "when": pa.array(np.arange(ROWS)),
            "click": pa.array((rng.random(ROWS) < 1 / (1 + np.exp(-odds))).astype(np.int8)),
        }
    )


def their_batch(log: pa.Table) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """The log as their own pipeline feeds it."""
    bags = [[[v] for v in log["user"].to_pylist()], [[v] for v in log["item"].to_pylist()], log["recent"].to_pylist()]
    ids = KeyedJaggedTensor(
        keys=["user", "item", "recent"],
        values=torch.tensor([v for feature in bags for bag in feature for v in bag]),
        lengths=torch.tensor([len(bag) for feature in bags for bag in feature]),
    )
    dense = torch.tensor(np.stack([log["hour"], log["price"]], axis=1), dtype=torch.float32)
    return dense, ids, torch.tensor(log["click"].to_numpy().astype(np.float32))[:, None]


def train_a_little(model: TheirModel, log: pa.Table) -> None:
    """A few steps of their own loop."""
    dense, ids, labels = their_batch(log)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(dense, ids), labels).backward()
        optimizer.step()


def exported(head: nn.Module) -> bytes:
    """Their dense part as ONNX: the one step that needs their code."""
    out = io.BytesIO()
    batch = {0: "batch"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            head.eval(),
            (torch.zeros(2, 2), torch.zeros(2, 32)),
            out,
            input_names=["dense", "looked_up"],
            output_names=["logits"],
            dynamic_axes={"dense": batch, "looked_up": batch, "logits": batch},
            dynamo=False,
        )
    return out.getvalue()


def their_run(folder: Path, **model: Any) -> RunConfig:
    """The schema: what the log's columns are, in the order in which the head reads them."""
    return RunConfig.model_validate(
        {
            "name": "theirs",
            "data": {
                "input": str(folder / "log" / "*.parquet"),
                "split": {"by": "timestamp", "fractions": [0.7, 0.2, 0.1]},
                "timestamp": "when",
                "tasks": [{"name": "click", "column": "click"}],
                "features": [
                    {"name": "user", "kind": "categorical", "side": "user"},
                    {"name": "item", "kind": "categorical", "side": "item"},
                    {"name": "recent", "kind": "multi", "side": "user", "table": "item", "pooling": "sum"},
                    {"name": "hour", "kind": "numeric", "transform": "none"},
                    {"name": "price", "kind": "numeric", "transform": "none"},
                ],
            },
            "model": model,
        }
    )


NAMES = {"user": "user_table", "item": "item_table"}


@pytest.fixture(scope="module")
def model() -> TheirModel:
    torch.manual_seed(3)
    model = TheirModel()
    train_a_little(model, their_log())
    return model.eval()


def test_model_of_others_is_compressed_and_scores_the_same(model: TheirModel, tmp_path: Path) -> None:
    """adopt -> prepare -> compress -> load, and the scores are those of their own forward within the codec's error."""
    log = their_log()
    write_log(log, tmp_path / "log")
    adopted = adopt(tmp_path / "theirs", their_run(tmp_path), model.state_dict(), exported(model.over), names=NAMES)
    run = load_run(adopted["run"])
    prepared = prepare_here(run, log, tmp_path / "prepared", load_transform(adopted["start"]))
    checkpoint = open_checkpoint(adopted["checkpoint"])
    dataset = data_of(checkpoint, prepared)
    profiles = profile_tables(checkpoint, dataset, quiet)
    with torch.no_grad():
        dense, ids, _ = their_batch(log.slice(840, 240))
        theirs = model(dense, ids).numpy()
    _, fp32 = score_split(model_of_checkpoint(checkpoint, dataset.transform), dataset, "val")
    assert np.abs(fp32 - theirs).max() < 1e-5
    assert theirs.std() > 0.1
    for bits, allowed in ((32, 1e-5), (16, 5e-3), (8, 5e-2)):
        out = tmp_path / f"artifact-{bits}"
        compress(checkpoint, dataset, CompressionPlan(default=TablePlan(bits=bits)), out, profiles, quiet)
        _, found = score_split(load_artifact(out, verify="full").model, dataset, "val")
        assert np.abs(found - theirs).max() < allowed
    pruned = CompressionPlan(default=TablePlan(bits=8, coverage=0.8))
    compress(checkpoint, dataset, pruned, tmp_path / "pruned", profiles, quiet)
    _, found = score_split(load_artifact(tmp_path / "pruned").model, dataset, "val")
    assert 0.01 < np.abs(found - theirs).max() < 3.0
    low = CompressionPlan(default=TablePlan(bits=32, rank=8))  # what reads a table in their head is not known
    compress(checkpoint, dataset, low, tmp_path / "low", profiles, quiet)
    whole = load_artifact(tmp_path / "low").model
    assert set(whole.lookup.decoders) == {"user"}
    _, found = score_split(whole, dataset, "val")
    assert 1e-4 < np.abs(found - theirs).max() < 3.0


def test_unknown_ids_read_the_mean_row_and_empty_bags_zero(model: TheirModel, tmp_path: Path) -> None:
    run = their_run(tmp_path)
    adopted = adopt(tmp_path / "theirs", run, model.state_dict(), exported(model.over), names=NAMES)
    rows = open_checkpoint(adopted["checkpoint"]).read("tables/item/weight")
    weight = model.ebc.embedding_bags["item_table"].weight.detach()
    assert torch.equal(rows[2:], weight)
    assert torch.allclose(rows[0], weight.mean(0))
    assert not rows[1].any()
    encoded = load_transform(adopted["start"]).encode(pa.table({"user": [7, 10**6, None], "item": [0, 1, 2]}))
    assert encoded.sparse["user"].values.tolist() == [9, 0, 1]
    assert encoded.sparse["recent"].values.tolist() == [1, 1, 1]


def test_ids_of_their_own_vocabulary_are_found(model: TheirModel, tmp_path: Path) -> None:
    words = [f"item-{i * 7}" for i in range(ITEMS)]
    head = exported(model.over)
    adopted = adopt(tmp_path / "t", their_run(tmp_path), model.state_dict(), head, ids={"item": words}, names=NAMES)
    encoded = load_transform(adopted["start"]).encode(pa.table({"item": ["item-0", "item-553", "item-1"]}))
    assert encoded.sparse["item"].values.tolist() == [2, 81, 0]


def test_head_of_ours_is_taken_by_its_state_dict(model: TheirModel, tmp_path: Path) -> None:
    run = their_run(tmp_path, arch="dlrm", embedding_dim=16, bottom_mlp=[8], top_mlp=[8])
    transform = load_transform(
        adopt(tmp_path / "a", run, model.state_dict(), exported(model.over), names=NAMES)["start"]
    )
    head = build_head(run.model, transform)
    adopted = adopt(tmp_path / "b", run, model.state_dict(), head.state_dict(), names=NAMES)
    stored = open_checkpoint(adopted["checkpoint"]).dense_state()
    assert all(torch.equal(stored[k], v) for k, v in head.state_dict().items())
    lacking = {k: v for k, v in head.state_dict().items() if k != "out.bias"}
    with pytest.raises(PlanError, match=r"out\.bias is not that of model\.arch dlrm"):
        adopt(tmp_path / "c", run, model.state_dict(), lacking, names=NAMES)
    assert not (tmp_path / "c").exists()


def test_adopted_run_learns_no_id(model: TheirModel, tmp_path: Path) -> None:
    adopted = adopt(tmp_path / "t", their_run(tmp_path), model.state_dict(), exported(model.over), names=NAMES)
    content = json.loads(adopted["run"].read_text())
    assert content["data"]["min_count"] > 10**18
    assert [f.get("dim") for f in content["data"]["features"]] == [16, 8, None, None, None]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"names": {}}, "table 'user': 0 tensors"),
        ({"ids": {"item": ["a", "b"]}}, "table 'item': 2 ids for 80 rows"),
        ({"ids": {"item": ["a"] * ITEMS}}, "give each row one id of its own"),
        ({"head": b"no model"}, "not a model that ONNX Runtime reads"),
        ({"nan": True}, "table 'user_table'.*finite"),
        ({"feature": {"name": "age", "kind": "numeric"}}, "feature 'age': transform standardize"),
        ({"feature": {"name": "town", "kind": "categorical", "hash_size": 9}}, "feature 'town': hash_size"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    model: TheirModel, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    run = their_run(tmp_path)
    if "feature" in change:
        content = run.model_dump(mode="json")
        content["data"]["features"].append(change["feature"])
        run = RunConfig.model_validate(content)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if "nan" in change:
        next(v for k, v in state.items() if "user_table" in k)[3, 1] = float("nan")
    head = change.get("head") or exported(model.over)
    with pytest.raises((PlanError, ArtifactError), match=match):
        adopt(tmp_path / "t", run, state, head, ids=change.get("ids"), names=change.get("names", NAMES))
    assert not (tmp_path / "t").exists()


def test_onnx_head_has_a_numeric_derivative(model: TheirModel) -> None:
    head = OnnxHead(torch.frombuffer(bytearray(exported(model.over)), dtype=torch.uint8))
    generator = torch.Generator().manual_seed(5)
    dense, looked_up = torch.randn(6, 2, generator=generator), torch.randn(6, 32, generator=generator)
    own, theirs = looked_up.clone().requires_grad_(), looked_up.clone().requires_grad_()
    head(dense, own).square().sum().backward()
    model.over(dense, theirs).square().sum().backward()
    assert own.grad is not None
    assert theirs.grad is not None
    assert float((own.grad - theirs.grad).norm() / theirs.grad.norm()) < 5e-3


def test_onnx_head_of_other_inputs_is_refused() -> None:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(nn.Linear(3, 1), (torch.zeros(2, 3),), out, dynamo=False)
    with pytest.raises(ArtifactError, match="export it with inputs"):
        OnnxHead(torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8))
