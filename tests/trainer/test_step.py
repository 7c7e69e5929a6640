"""trainer/step.py and optimizer.py: the loss, one step against its formula, evaluation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from trainer_builders import CPU, fitted, make_run, random_log, shard

from trainer.checkpoint import training_state
from trainer.data.batch import to_batch
from trainer.models import build_ranker, module_name
from trainer.optimizer import TABLE_EPS
from trainer.step import gather_rows, loss_of, predict, train_step

pytestmark = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)


def some_batch(transform, rows: int, seed: int = 1, tasks: int = 1):
    raw = random_log(rows, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 2, (rows, tasks)).astype(np.float32)
    return to_batch(transform.encode(raw), labels)


def test_loss_is_the_sum_over_rows_of_the_mean_over_tasks():
    logits, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    per_task = [F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t], reduction="sum") for t in range(3)]
    torch.testing.assert_close(loss_of(logits, torch.zeros(6, 4), labels, 2, 0.0), sum(per_task) / 3)


def test_loss_adds_the_mean_over_features_of_their_squared_norms():
    logits, labels = torch.randn(6, 1), torch.ones(6, 1)
    features = [torch.randn(6, 4), torch.randn(6, 8)]
    norms = sum((f**2).sum() for f in features) / 2
    plain = loss_of(logits, torch.cat(features, dim=1), labels, 2, 0.0)
    torch.testing.assert_close(loss_of(logits, torch.cat(features, dim=1), labels, 2, 0.3), plain + 0.3 * norms)


@pytest.mark.parametrize("cuts", [(0, 16, 32), (0, 5, 32), (0, 1, 2, 31, 32)])
def test_gradients_of_unequal_slices_add_up_to_the_whole_batchs(cuts):
    run = make_run()
    transform = fitted(random_log(80), run.data)
    torch.manual_seed(0)
    ranker = build_ranker(run.model, transform, "cpu")
    encoded = transform.encode(random_log(32, seed=1))
    labels = np.random.default_rng(0).integers(0, 2, (32, 1)).astype(np.float32)

    def gradients(rows: np.ndarray, slow: bool = False) -> list[torch.Tensor]:
        batch = to_batch(encoded.take(rows), labels[rows])
        ranker.zero_grad()
        logits, pooled = ranker(batch.dense, batch.sparse)
        if slow:
            loss = (
                F.binary_cross_entropy_with_logits(logits, batch.labels) + 0.1 * pooled.square().sum(dim=1).mean() / 6
            )
        else:
            loss = loss_of(logits, pooled, batch.labels, 6, 0.1) / 32
        loss.backward()
        return [p.grad.clone() for p in ranker.parameters()]

    expected = gradients(np.arange(32), slow=True)
    slices = [gradients(np.arange(a, b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    for i, want in enumerate(expected):
        torch.testing.assert_close(sum(s[i] for s in slices), want, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("group")
def test_step_is_adagrad_by_row_on_tables_and_adamw_on_the_head():
    run = make_run(train={"table_lr": 0.05, "dense_lr": 0.01, "weight_decay": 0.1, "table_l2": 0.1})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    twin = build_ranker(run.model, transform, "cpu")
    bags = {name: twin.embeddings.embedding_bags[module_name(name)] for name in transform.tables}
    assert len(bags) == len(twin.embeddings.embedding_bags)
    state = training_state(model, optimizer)
    with torch.no_grad():
        for name, bag in bags.items():
            bag.weight.copy_(state[f"tables/{name}/weight"].local_shards()[0].tensor)
        for name, parameter in twin.head.named_parameters():
            parameter.copy_(state[f"dense/head.{name}"])
    adamw = torch.optim.AdamW(twin.head.parameters(), lr=0.01, weight_decay=0.1)
    momentum = {name: torch.zeros(len(bag.weight)) for name, bag in bags.items()}

    for step in range(3):
        batch = some_batch(transform, 24, seed=step)
        loss = train_step(model, optimizer, batch, 24, 1, 0.1)
        twin.zero_grad()
        logits, pooled = twin(batch.dense, batch.sparse)
        squares = pooled.square().sum(dim=1).mean() / len(transform.sparse)
        expected = F.binary_cross_entropy_with_logits(logits, batch.labels) + 0.1 * squares
        expected.backward()
        adamw.step()
        with torch.no_grad():
            for name, bag in bags.items():
                momentum[name] += bag.weight.grad.square().mean(dim=1)
                bag.weight -= 0.05 * bag.weight.grad / (momentum[name].sqrt()[:, None] + TABLE_EPS)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)

    state = training_state(model, optimizer)
    for name, bag in bags.items():
        got = state[f"tables/{name}/weight"].local_shards()[0].tensor
        torch.testing.assert_close(got, bag.weight.detach(), rtol=1e-4, atol=1e-5)
        got = state[f"tables/{name}/momentum1"].local_shards()[0].tensor
        torch.testing.assert_close(got, momentum[name], rtol=1e-4, atol=1e-8)
    for name, parameter in twin.head.named_parameters():
        torch.testing.assert_close(state[f"dense/head.{name}"], parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("group")
def test_steps_learn_what_they_are_shown():
    run = make_run()
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    batch = some_batch(transform, 24)
    losses = [float(train_step(model, optimizer, batch, 24, 1, 0.0)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_predictions_come_in_order_without_dropout_and_leave_training_on():
    run = make_run(model={"dropout": 0.5, "top_mlp": [64]})
    transform = fitted(random_log(80), run.data)
    ranker = build_ranker(run.model, transform, "cpu")
    batches = [some_batch(transform, rows, seed=rows) for rows in (7, 5)]
    labels, logits = predict(ranker, [(b, len(b)) for b in batches], CPU)
    assert ranker.training
    np.testing.assert_array_equal(labels, np.concatenate([b.labels.numpy() for b in batches]))
    quiet = copy.deepcopy(ranker).eval()
    expected = torch.cat([quiet(b.dense, b.sparse)[0] for b in batches])
    np.testing.assert_array_equal(logits, expected.detach().numpy())


def test_rows_are_gathered_from_this_process_where_it_is_alone():
    rows = np.arange(4)
    assert gather_rows(rows) is rows


@pytest.mark.usefixtures("group")
def test_rows_are_gathered_from_a_group_of_one():
    assert gather_rows(np.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("group")
def test_steps_on_unequal_slices_add_up_to_the_whole_batch():
    # what three ranks would do one after another here: nothing moves at this rate, gradients stay in .grad
    run = make_run(train={"table_lr": 1e-12, "dense_lr": 1e-12})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    encoded = transform.encode(random_log(32, seed=1))
    labels = np.random.default_rng(0).integers(0, 2, (32, 1)).astype(np.float32)

    def step(first: int, last: int, world_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rows = np.arange(first, last)
        loss = train_step(model, optimizer, to_batch(encoded.take(rows), labels[rows]), 32, world_size, 0.1)
        return loss, [p.grad.clone() for p in model.module.head.parameters()]

    whole_loss, whole = step(0, 32, 1)
    parts = [step(first, last, 3) for first, last in ((0, 3), (3, 20), (20, 32))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss)
    for i, want in enumerate(whole):
        averaged = sum(gradients[i] for _, gradients in parts) / 3  # as data-parallel training averages over ranks
        torch.testing.assert_close(averaged, want, rtol=1e-4, atol=1e-6)
