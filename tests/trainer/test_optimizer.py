"""trainer/optimizer.py: the plain table optimizer against FBGEMM's kernels, what is refused, schedules, clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from trainer_builders import fitted, local_tensors, make_run, random_log, shard

from trainer.checkpoint import training_state
from trainer.config import TrainConfig
from trainer.data.batch import Batch, to_batch
from trainer.errors import ConfigError
from trainer.optimizer import FUSED, TABLE_EPS, TableOptimizer, check_table_optimizers, lr_factor, set_lr
from trainer.step import Loss, train_step

pytestmark = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning",
    "ignore:Please use DTensor instead:FutureWarning",
    "ignore:fbgemm..dense_embedding_codegen_lookup_function:UserWarning",  # its gradient is tested here
)

KINDS = list(FUSED)


def some_batch(transform, seed: int, rows: int = 24) -> Batch:
    labels = np.random.default_rng(seed).integers(0, 2, (rows, 1)).astype(np.float32)
    return to_batch(transform.encode(random_log(rows, seed=seed)), labels)


def tables_of(model, optimizer) -> dict[str, torch.Tensor]:
    state = training_state(model, optimizer)
    keys = [k for k in state if k.startswith("tables/") and k.endswith("/weight")]
    return {k: torch.cat(local_tensors(state[k])).detach().clone() for k in keys}


# -- the plain twin of the kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_table_optimizer_equals_the_fused_kernel(kind):
    """Several steps, with rows that repeat within a bag and a batch, rows that rest a while, and one never read."""
    rows, dim, lr = 9, 8, 0.1
    start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=FUSED[kind][1],
        learning_rate=lr,
        eps=TABLE_EPS,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu"),
    )
    kernel.split_embedding_weights()[0].copy_(start)
    table = torch.nn.Parameter(start.clone())
    twin = TableOptimizer([table], kind, lr)
    rng = np.random.default_rng(1)
    for step in range(6):
        ids = torch.from_numpy(rng.integers(0, 4 if step % 2 else rows - 1, 20))
        ids[1] = ids[0]
        offsets = torch.tensor([0, 2, 2, 9, 20])
        target = torch.from_numpy(rng.normal(size=(4, dim)).astype(np.float32))
        (kernel(ids, offsets) * target).sum().backward()
        twin.zero_grad()
        pooled = torch.nn.functional.embedding_bag(ids, table, offsets[:-1], mode="sum")
        (pooled * target).sum().backward()
        twin.step()
        torch.testing.assert_close(table.detach(), kernel.split_embedding_weights()[0], rtol=0, atol=1e-6)
    assert not torch.equal(table[:4], start[:4])
    assert torch.equal(table[rows - 1].detach(), start[rows - 1]), "a row that no bag reads stays as it was"
    if kind != "sgd":
        fused = kernel.split_optimizer_states()[0][0]
        own = twin.state[table]["momentum1"]
        torch.testing.assert_close(own, fused.view_as(own), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", KINDS)
def test_copied_tables_train_as_sharded_ones_do(kind):
    """One model with tables in the kernels, one with data-parallel tables: the same weights after some steps."""
    found = []
    for placing in ("table_wise", "data_parallel"):
        run = make_run(train={"table_optimizer": kind, "table_lr": 0.05, "sharding": {"default": placing}})
        transform = fitted(random_log(80), run.data)
        model, optimizer = shard(run, transform, seed=0)
        for seed in range(3):
            train_step(model, optimizer, Loss(run), some_batch(transform, seed), 1)
        found.append(tables_of(model, optimizer))
    for key, table in found[0].items():
        torch.testing.assert_close(found[1][key], table, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.usefixtures("group")
def test_copied_and_sharded_tables_save_the_same_state():
    names = []
    for placing in ("table_wise", "data_parallel"):
        run = make_run(train={"sharding": {"default": placing}})
        model, optimizer = shard(run, fitted(random_log(80), run.data), seed=0)
        names.append({k: tuple(v.size()) for k, v in training_state(model, optimizer).items()})
    assert names[0] == names[1]
    assert any(k.endswith("/momentum1") for k in names[0])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_tables_without_a_chosen_optimizer_are_refused():
    """TorchRec would train them with SGD at lr .01 and say nothing."""
    run = make_run()
    with pytest.raises(ConfigError, match=r"tables .*user.*: would train with .*sgd at lr 0\.01, which nobody chose"):
        shard(run, fitted(random_log(80), run.data), seed=0, fuse=False)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"table_lr": 0.03}, r"at lr 0\.02, which nobody chose: train\.table_optimizer is rowwise_adagrad at 0\.03"),
        (
            {"table_optimizer": "adagrad"},
            r"would train with exact_row_wise_adagrad at lr 0\.02, .*: train\.table_optimizer is adagrad at 0\.02",
        ),
    ],
)
def test_tables_with_another_optimizer_than_the_configs_are_refused(other, says):
    run = make_run()
    model, _ = shard(run, fitted(random_log(80), run.data), seed=0)
    check_table_optimizers(model, set(), run.train)
    with pytest.raises(ConfigError, match=says):
        check_table_optimizers(model, set(), make_run(train=other).train)


@pytest.mark.usefixtures("group")
def test_copied_table_that_nothing_trains_is_refused():
    run = make_run(train={"sharding": {"tables": {"user": "data_parallel"}}})
    model, _ = shard(run, fitted(random_log(80), run.data), seed=0)
    with pytest.raises(ConfigError, match="tables user: no table optimizer trains them"):
        check_table_optimizers(model, set(), run.train)


# -- learning rates --------------------------------------------------------------------------------------------------


def factors(total: int, **schedule) -> list[float]:
    return [lr_factor(TrainConfig(schedule=schedule), step, total) for step in range(total + 3)]


def test_lr_without_a_schedule_stays():
    assert factors(5) == [1.0] * 8


def test_lr_warms_up_in_a_line_and_never_starts_at_zero():
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_lr_decays_in_a_line_to_its_end_and_stays_there():
    found = factors(10, decay="linear", end=0.2)
    assert found[:11] == pytest.approx(np.linspace(1.0, 0.2, 11).tolist())
    assert found[11:] == pytest.approx([0.2, 0.2])


def test_lr_decays_as_a_cosine():
    found = factors(8, decay="cosine")
    assert found[:9] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * s / 8) for s in range(9)])
    assert found[9:] == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_lr_decays_from_the_end_of_the_warm_up(decay):
    found = factors(12, warmup_steps=4, decay=decay, end=0.1)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx(1.0)
    assert found[8] == pytest.approx(0.55), "half-way"
    assert found[12] == pytest.approx(0.1)
    assert sorted(found[3:], reverse=True) == found[3:]


def test_warm_up_longer_than_the_run_still_decays_to_a_number():
    assert all(0 < f <= 1 for f in factors(3, warmup_steps=10, decay="linear", end=0.5))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("placing", ["table_wise", "data_parallel"])
def test_set_lr_reaches_tables_and_dense_part(placing):
    """At lr 0 no row and no weight moves; back at 1, they do."""
    run = make_run(train={"sharding": {"default": placing}, "weight_decay": 0.1})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    batches = [some_batch(transform, seed) for seed in range(4)]
    train_step(model, optimizer, Loss(run), batches[0], 1)
    set_lr(optimizer, 0.0)
    before, head = tables_of(model, optimizer), model.module.head.out.weight.detach().clone()
    for batch in batches[1:3]:
        train_step(model, optimizer, Loss(run), batch, 1)
    after = tables_of(model, optimizer)
    assert {k for k in before if not torch.equal(before[k], after[k])} == set()
    assert torch.equal(model.module.head.out.weight, head)
    set_lr(optimizer, 1.0)
    for batch in batches[2:]:
        train_step(model, optimizer, Loss(run), batch, 1)
    assert not torch.equal(tables_of(model, optimizer)["tables/user/weight"], before["tables/user/weight"])
    assert not torch.equal(model.module.head.out.weight, head)


@pytest.mark.usefixtures("group")
def test_set_lr_multiplies_the_base_and_not_the_last_rate():
    run = make_run()
    _, optimizer = shard(run, fitted(random_log(80), run.data), seed=0)
    for _ in range(3):
        set_lr(optimizer, 0.5)
    rates = sorted({g["lr"] for g in optimizer.param_groups})
    assert rates == pytest.approx([0.5 * run.train.dense_lr, 0.5 * run.train.table_lr])


# -- clipping --------------------------------------------------------------------------------------------------------


def moved_by_one_step(clip: float | None) -> tuple[float, dict[str, torch.Tensor]]:
    """How far one step of SGD at lr 1 moves the dense part (which is its gradient's norm), and the tables after it."""
    run = make_run(train={"clip_norm": clip, "dense_optimizer": "sgd", "dense_lr": 1.0})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    before = [p.detach().clone() for p in model.module.head.parameters()]
    train_step(model, optimizer, Loss(run), some_batch(transform, 1), 1)
    steps = [p.detach() - b for p, b in zip(model.module.head.parameters(), before, strict=True)]
    return float(torch.cat([s.flatten() for s in steps]).norm()), tables_of(model, optimizer)


@pytest.mark.usefixtures("group")
def test_clipping_bounds_the_dense_gradient_and_leaves_tables_alone():
    free, tables = moved_by_one_step(None)
    assert free > 0.02
    clipped, same = moved_by_one_step(0.01)
    assert clipped == pytest.approx(0.01, rel=1e-3)
    unbound, _ = moved_by_one_step(100.0)
    assert unbound == pytest.approx(free, rel=1e-5)
    for key, table in tables.items():
        assert torch.equal(same[key], table), key
