"""trainer/models: shapes, slow twins of all heads, and tables looked up in the features' order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from trainer_builders import data_of, fitted, make_run, random_log

from trainer.config import ModelConfig
from trainer.data.batch import Batch, to_batch
from trainer.models import build_head, build_ranker, head_shape, module_name, pooling_of
from trainer.models.dcn import DCNHead
from trainer.models.deepfm import DeepFMHead
from trainer.models.dlrm import DLRMHead
from trainer.models.mmoe import MMoEHead
from trainer.models.ranker import BatchNorm, Dropout, HeadShape, Ranker, in_order, mlp

MODELS = {
    "dlrm": ModelConfig(arch="dlrm", bottom_mlp=(6,), top_mlp=(7, 5), dropout=0.0),
    "dcn": ModelConfig(arch="dcn", cross_layers=2, cross_rank=3, top_mlp=(7, 5), dropout=0.0),
    "deepfm": ModelConfig(arch="deepfm", top_mlp=(7, 5), dropout=0.0),
    "mmoe": ModelConfig(arch="mmoe", experts=3, top_mlp=(7, 5), tower_mlp=(6,), dropout=0.0),
}
TWO_TASKS = [{"name": "click", "column": "label"}, {"name": "buy", "column": "label"}]
NO_NUMBERS = [
    {"name": "user", "kind": "categorical", "dim": 4},
    {"name": "tags", "kind": "multi", "separator": "|", "pooling": "sum"},
]


def make_ranker(arch: str, **data) -> tuple[Ranker, object]:
    """A ranker on CPU and encoded rows for it."""
    run = make_run(model={"arch": arch}, **data)
    transform = fitted(random_log(80), run.data)
    torch.manual_seed(0)
    return build_ranker(run.model.model_copy(update={"table_init": 0.5}), transform, "cpu"), transform


def lookup(ranker: Ranker, transform, encoded) -> Tensor:
    """Slow twin: pooled embeddings row by row, in the order of the transform's features."""
    columns = []
    for name, ragged in encoded.sparse.items():
        weight = ranker.embeddings.embedding_bags[module_name(transform.table_of(name).name)].weight
        lengths = np.ones(len(ragged), dtype=int) if ragged.lengths is None else ragged.lengths
        bags = np.split(ragged.values, np.cumsum(lengths)[:-1])
        pool = Tensor.mean if pooling_of(transform, name) == "mean" else Tensor.sum
        columns.append(torch.stack([pool(weight[torch.from_numpy(bag)], dim=0) for bag in bags]))
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("data", [{}, {"features": NO_NUMBERS}, {"tasks": TWO_TASKS}], ids=["all", "no dense", "tasks"])
def test_ranker_gives_a_logit_for_each_row_and_task(arch, data):
    ranker, transform = make_ranker(arch, **data)
    encoded = transform.encode(random_log(20, seed=1))
    batch = to_batch(encoded)
    logits, pooled = ranker(batch)
    assert logits.shape == (20, len(data.get("tasks", [1])))
    torch.testing.assert_close(pooled, lookup(ranker, transform, encoded))
    assert len(torch.unique(logits[:, 0])) > 10, "rows are told apart"


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("data", [{}, {"features": NO_NUMBERS}, {"tasks": TWO_TASKS}], ids=["all", "no dense", "tasks"])
def test_gradient_reaches_every_parameter(arch, data):
    ranker, transform = make_ranker(arch, **data)
    batch = to_batch(transform.encode(random_log(60, seed=1)))
    logits, _ = ranker(batch)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    without = [n for n, p in ranker.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("arch", MODELS)
def test_logits_do_not_depend_on_the_order_of_keys(arch):
    ranker, transform = make_ranker(arch)
    batch = to_batch(transform.encode(random_log(20, seed=1)))
    expected, _ = ranker(batch)
    order = [3, 0, 5, 2, 4, 1]
    shuffled = batch.sparse.permute(order)
    assert shuffled.keys() == [batch.sparse.keys()[i] for i in order]
    torch.testing.assert_close(ranker(replace(batch, sparse=shuffled))[0], expected)


def test_shared_table_feeds_features_in_their_own_places():
    # tables group a and c together; the head must see a, b, c
    shared = {"kind": "categorical", "min_count": 1}
    data = data_of(
        {"name": "a", **shared, "dim": 4},
        {"name": "b", **shared, "dim": 8},
        {"name": "c", "kind": "categorical", "table": "a"},
    )
    raw = pa.table({"a": ["x", "y"], "b": ["p", "q"], "c": ["y", "z"]})
    transform = fitted(raw, data)
    ranker = build_ranker(ModelConfig(top_mlp=(4,)), transform, "cpu")
    encoded = transform.encode(raw)
    batch = to_batch(encoded)
    pooled = ranker(batch)[1]
    torch.testing.assert_close(pooled, lookup(ranker, transform, encoded))
    assert head_shape(transform) == HeadShape(0, (4, 8, 4), 1, ("a", "b", "c"), (None,) * 3, (None,) * 3)
    torch.testing.assert_close(pooled[0, 12:], pooled[1, :4])  # c's "y" in row 0 is a's "y" in row 1


def test_embeddings_read_hand_made_jagged_ids():
    ranker, _ = make_ranker("dcn", features=NO_NUMBERS)
    weights = {n: bag.weight for n, bag in ranker.embeddings.embedding_bags.items()}
    sparse = KeyedJaggedTensor(
        keys=["user", "tags"], values=torch.tensor([2, 3, 1, 2, 3, 0]), lengths=torch.tensor([1, 1, 1, 3])
    )
    pooled = ranker(Batch(torch.zeros(2, 0), sparse))[1]
    expected = torch.stack(
        [
            torch.cat([weights["t_user"][2], weights["t_tags"][1]]),
            torch.cat([weights["t_user"][3], weights["t_tags"][[2, 3, 0]].sum(dim=0)]),
        ]
    )
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_dlrm_equals_its_formula(num_dense):
    torch.manual_seed(0)
    head = DLRMHead(MODELS["dlrm"], HeadShape(num_dense, (4, 8, 8), 2))
    dense, pooled = torch.randn(5, num_dense), torch.randn(5, 20)
    expected = []
    for x, p in zip(dense, pooled, strict=True):
        vectors = [head.project[0](p[:4]), p[4:12], p[12:]]
        first = [p]
        if num_dense:
            vectors.append(head.bottom(x))
            first.append(vectors[-1])
        dots = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        expected.append(head.out(head.top(torch.cat([*first, torch.stack(dots)]))))
    torch.testing.assert_close(head(dense, pooled), torch.stack(expected))


@pytest.mark.parametrize("num_dense", [0, 3])
def test_dcn_equals_its_formula(num_dense):
    torch.manual_seed(0)
    head = DCNHead(MODELS["dcn"], HeadShape(num_dense, (4, 8), 2))
    dense, pooled = torch.randn(5, num_dense), torch.randn(5, 12)
    x0 = x = torch.cat([dense, pooled], dim=1)
    for cross in head.crosses:
        x = x0 * (x @ cross.down.weight.T @ cross.up.weight.T + cross.up.bias) + x
    torch.testing.assert_close(head(dense, pooled), head.out(torch.cat([x, head.deep(x0)], dim=1)))


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("tasks", [1, 2])
def test_deepfm_equals_its_formula(num_dense, tasks):
    """Pairwise products summed pair by pair; features narrower than the widest are projected to it."""
    torch.manual_seed(0)
    head = DeepFMHead(MODELS["deepfm"], HeadShape(num_dense, (4, 8, 8), tasks))
    dense, pooled = torch.randn(5, num_dense), torch.randn(5, 20)
    expected = []
    for x, p in zip(dense, pooled, strict=True):
        vectors = [head.project[0].weight @ p[:4], p[4:12], p[12:]]
        if num_dense:
            vectors.append(head.dense_vector.weight @ x)
        pairs = sum(vectors[i] * vectors[j] for i in range(len(vectors)) for j in range(i))
        both = torch.cat([x, p])
        expected.append(head.first_order.weight @ both + head.out(torch.cat([pairs, head.deep(both)])))
    torch.testing.assert_close(head(dense, pooled), torch.stack(expected))


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("tasks", [1, 2])
def test_mmoe_equals_its_formula(num_dense, tasks):
    """Each task's softmax gate mixes the shared experts; its own tower reads the mix."""
    torch.manual_seed(0)
    head = MMoEHead(MODELS["mmoe"], HeadShape(num_dense, (4, 8), tasks))
    assert (len(head.experts), len(head.gates), len(head.towers)) == (3, tasks, tasks)
    dense, pooled = torch.randn(5, num_dense), torch.randn(5, 12)
    expected = []
    for row in torch.cat([dense, pooled], dim=1):
        logits = []
        for task in range(tasks):
            gate = (head.gates[task].weight @ row + head.gates[task].bias).exp()
            mix = sum(gate[e] / gate.sum() * head.experts[e](row) for e in range(3))
            logits.append(head.towers[task](mix) @ head.out.weight[task] + head.out.bias[task])
        expected.append(torch.stack(logits))
    torch.testing.assert_close(head(dense, pooled), torch.stack(expected))


def test_tasks_of_mmoe_read_no_tower_but_their_own():
    head = MMoEHead(MODELS["mmoe"], HeadShape(0, (4,), 2)).eval()
    pooled = torch.randn(5, 4)
    before = head(torch.zeros(5, 0), pooled)
    with torch.no_grad():
        head.towers[1][0].bias += 5.0
        head.gates[1].bias[0] += 1.0
    after = head(torch.zeros(5, 0), pooled)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.equal(after[:, 1], before[:, 1])


def test_cross_rank_is_no_more_than_the_width():
    assert DCNHead(ModelConfig(cross_rank=64), HeadShape(0, (4,), 1)).crosses[0].down.weight.shape == (4, 4)


@pytest.mark.parametrize("arch", MODELS)
def test_head_without_hidden_layers_still_ranks(arch):
    head = build_head(
        ModelConfig(arch=arch, top_mlp=(), tower_mlp=(), cross_layers=0), fitted(random_log(80), make_run().data)
    ).eval()
    assert head(torch.zeros(3, 3), torch.zeros(3, sum([8, 4, 4, 8, 8, 8]))).shape == (3, 1)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layers = mlp([4, 64], dropout=0.5)
    x = torch.ones(1, 4)
    assert not torch.equal(layers(x), layers(x))
    layers.eval()
    assert torch.equal(layers(x), layers(x))


@pytest.mark.parametrize("arch", MODELS)
def test_batch_norm_reaches_every_architecture(arch):
    model = MODELS[arch].model_copy(update={"batch_norm": True})
    transform = fitted(random_log(80), make_run().data)
    head = build_head(model, transform)
    norms = {n: m for n, m in head.named_modules() if isinstance(m, BatchNorm)}
    assert {m.weight.shape[0] for m in norms.values()} >= {7, 5}
    head.train()
    head(torch.randn(30, 3), torch.randn(30, 40)).square().sum().backward()
    assert [n for n, m in norms.items() if not m.bias.grad.abs().sum() > 0] == []
    assert not any(isinstance(m, BatchNorm) for m in build_head(MODELS[arch], transform).modules())


def test_tables_narrower_than_the_head_expects_read_as_zero_beyond():
    run = make_run()
    transform = fitted(random_log(80), run.data)
    whole = build_ranker(run.model, transform, "cpu")
    cut = build_ranker(run.model, transform, "cpu", dims={"user": 4})
    with torch.no_grad():
        cut.head.load_state_dict(whole.head.state_dict())
        for name, bag in whole.embeddings.embedding_bags.items():
            width = cut.embeddings.embedding_bags[name].weight.shape[1]
            cut.embeddings.embedding_bags[name].weight.copy_(bag.weight[:, :width])
            bag.weight[:, width:] = 0
    batch = to_batch(transform.encode(random_log(20, seed=1)))
    assert cut.embeddings.embedding_bags["t_user"].weight.shape[1] == 4
    torch.testing.assert_close(cut(batch)[0], whole(batch)[0])
    assert cut(batch)[1].shape[1] == whole(batch)[1].shape[1] - 4 == len(cut.l2_scale)


def test_tables_start_within_their_bound():
    run = make_run(model={"table_init": 0.01})
    ranker = build_ranker(run.model, fitted(random_log(80), run.data), "cpu")
    for bag in ranker.embeddings.embedding_bags.values():
        assert 0.005 < bag.weight.abs().max() <= 0.01


def test_features_that_share_a_table_may_pool_differently():
    """A lookup has one pooling a table, so the means become weighted sums."""
    features = [
        {"name": "item", "kind": "multi", "pooling": "mean", "min_count": 1},
        {"name": "history", "kind": "multi", "pooling": "sum", "table": "item"},
    ]
    data = make_run(features=features).data
    raw = pa.table({"item": [["a", "b"], ["c"], None], "history": [["c"], ["a", "b", "b"], ["a", "c"]]})
    transform = fitted(raw, data)
    ranker = build_ranker(ModelConfig(top_mlp=(4,)), transform, "cpu")
    assert ranker.embeddings.is_weighted()
    encoded = transform.encode(raw)
    assert encoded.sparse["item"].weights is not None
    torch.testing.assert_close(ranker(to_batch(encoded))[1], lookup(ranker, transform, encoded))


@pytest.mark.parametrize("name", ["type", "items", "values", "half", "forward"])
def test_feature_may_have_any_name_the_schema_allows(name):
    data = data_of({"name": name, "kind": "categorical"})
    ranker = build_ranker(ModelConfig(), fitted(pa.table({name: ["x", "x"]}), data), "cpu")
    assert list(ranker.embeddings.embedding_bags) == [module_name(name)] == [f"t_{name}"]


# -- what makes a step cheap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(dtype, p):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(1001, 403, dtype=dtype, requires_grad=True)
    out = dropout(x)
    assert out.dtype == dtype
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.004)  # 5 standard errors of 400k values
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    for lane in range(4):  # four values share a draw: none may be more likely to go than another
        assert (out.reshape(-1)[lane::4] == 0).float().mean().item() == pytest.approx(p, abs=0.008)
    out.float().sum().backward()
    assert torch.equal(x.grad, out)


def test_dropout_depends_on_the_seed_alone_and_does_nothing_in_evaluation():
    dropout, x = Dropout(0.3), torch.randn(64, 7)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "a", "b"]])
def test_lookups_come_in_the_order_asked_for_with_their_gradients(order):
    parts = {name: torch.randn(5, dim, requires_grad=True) for name, dim in (("a", 4), ("b", 8), ("c", 12))}
    found = KeyedTensor(order, [parts[n].shape[1] for n in order], torch.cat([parts[n] for n in order], dim=1))
    whole = in_order(found, ["a", "b", "c"])
    assert torch.equal(whole, torch.cat(list(parts.values()), dim=1))
    weights = torch.randn(5, 24)
    (whole * weights).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parts.values()], dim=1), weights)
