"""trainer/step.py: the loss against its formulas, one step against a plain twin, what a step learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainer_builders import CPU, fitted, make_run, random_log, shard

from trainer.checkpoint import training_state
from trainer.data.batch import Batch, to_batch
from trainer.data.encoded import Encoded, Ragged
from trainer.models import build_ranker, module_name
from trainer.optimizer import TABLE_EPS
from trainer.step import Loss, Stepper, train_step

pytestmark = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)

TASKS = [{"name": name, "column": "label"} for name in ("click", "buy", "like")]
SCALE = torch.tensor([0.5] * 4 + [0.5] * 8)  # two features, of dims 4 and 8


def some_batch(transform, rows: int, seed: int = 1, tasks: int = 1) -> Batch:
    raw = random_log(rows, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 2, (rows, tasks)).astype(np.float32)
    return to_batch(transform.encode(raw), labels)


def labelled(labels: Tensor, teacher: Tensor | None = None, rows: int | None = None) -> Batch:
    """A batch of which the loss reads nothing but labels and the teacher."""
    empty = Encoded({"a": Ragged(np.zeros(len(labels), dtype=np.int64))}, np.zeros((len(labels), 0), np.float32))
    return to_batch(empty, labels.numpy(), None if teacher is None else teacher.numpy(), rows)


def loss_with(train: dict | None = None, tasks: list | None = None, negative_rate: float = 1.0) -> Loss:
    return Loss(make_run(train=train, tasks=tasks or TASKS[:1]), negative_rate)


# -- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_rows_of_the_mean_over_tasks():
    logits, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    per_task = [F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t]) for t in range(3)]
    loss = loss_with({"table_l2": 0}, TASKS)(logits, torch.zeros(6, 12), labelled(labels), SCALE)
    torch.testing.assert_close(loss, sum(per_task) / 3)


def test_loss_is_a_share_of_the_mean_over_the_global_batch():
    logits, labels = torch.randn(6, 1), torch.randint(0, 2, (6, 1)).float()
    loss = loss_with({"table_l2": 0})(logits, torch.zeros(6, 12), labelled(labels, rows=24), SCALE)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 24)


def test_loss_weighs_tasks_by_their_share_of_all_weights():
    tasks = [task | {"weight": weight} for task, weight in zip(TASKS, (1.0, 5.0, 2.0), strict=True)]
    logits, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    per_task = [F.binary_cross_entropy_with_logits(logits[:, t], labels[:, t]) for t in range(3)]
    loss = loss_with({"table_l2": 0}, tasks)(logits, torch.zeros(6, 12), labelled(labels), SCALE)
    torch.testing.assert_close(loss, (1 * per_task[0] + 5 * per_task[1] + 2 * per_task[2]) / 8)


def test_loss_adds_the_mean_over_features_of_their_squared_norms():
    logits, labels = torch.randn(6, 1), torch.ones(6, 1)
    features = [torch.randn(6, 4), torch.randn(6, 8)]
    norms = sum((f**2).sum() for f in features) / 2 / 6
    looked_up = torch.cat(features, dim=1)
    plain = loss_with({"table_l2": 0})(logits, looked_up, labelled(labels), SCALE)
    torch.testing.assert_close(
        loss_with({"table_l2": 0.3})(logits, looked_up, labelled(labels), SCALE), plain + 0.3 * norms
    )


def test_l2_counts_a_sequence_as_one_feature_whatever_its_positions():
    features = [
        {"name": "item", "kind": "categorical", "dim": 4},
        {"name": "hashed", "kind": "categorical", "hash_size": 11, "dim": 8},
        {"name": "history", "kind": "sequence", "table": "item", "pooling": "attention", "max_length": 3},
    ]
    run = make_run(features=features)
    ranker = build_ranker(run.model, fitted(random_log(80), run.data), "cpu")
    assert [n for n, _ in ranker.lookups] == ["item", "hashed", "history@0", "history@1", "history@2"]
    expected = torch.cat([torch.full((4,), 1 / 3), torch.full((8,), 1 / 3), torch.full((12,), 1 / 9)])
    torch.testing.assert_close(ranker.l2_scale, expected)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (3.0, 0.2), (2.0, 1.0)])
def test_distillation_equals_its_formula(temperature, alpha):
    """Slow twin: cross-entropy of the softened probabilities, row by row and task by task, in plain floats."""
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    labels = rng.integers(0, 2, (5, 2))
    weights = (3.0, 1.0)

    def cross_entropy(target: float, logit: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -target * math.log(p) - (1 - target) * math.log(1 - p)

    expected = 0.0
    for row in range(5):
        for task in range(2):
            hard = cross_entropy(labels[row, task], logits[row, task])
            target = 1 / (1 + math.exp(-teacher[row, task] / temperature))
            soft = cross_entropy(target, logits[row, task] / temperature) * temperature**2
            expected += weights[task] / 4 * ((1 - alpha) * hard + alpha * soft) / 5
    distill = {"teacher": "t", "temperature": temperature, "alpha": alpha}
    tasks = [task | {"weight": weight} for task, weight in zip(TASKS, weights, strict=False)]
    batch = labelled(torch.tensor(labels, dtype=torch.float32), torch.tensor(teacher, dtype=torch.float32))
    loss = loss_with({"table_l2": 0, "distill": distill}, tasks)
    found = loss(torch.tensor(logits, dtype=torch.float32), torch.zeros(5, 12), batch, SCALE)
    torch.testing.assert_close(float(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_model_of_sampled_negatives_is_calibrated(rate):
    """A bias alone, trained where a share `rate` of the negatives is left, finds the rate of the whole log."""
    rng = np.random.default_rng(0)
    labels = (rng.random(40_000) < 0.2).astype(np.float32)
    kept = labels[(labels == 1) | (rng.random(40_000) < rate)][:, None]
    batch = labelled(torch.from_numpy(kept))
    loss = loss_with({"table_l2": 0}, negative_rate=rate)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(bias.expand(len(kept), 1), torch.zeros(len(kept), 12), batch, SCALE)
        value.backward()
        return value

    optimizer.step(closure)
    assert float(torch.sigmoid(bias.detach())) == pytest.approx(float(labels.mean()), abs=0.01)
    if rate < 1:
        assert kept.mean() > labels.mean() + 0.1, "the sampled log alone says something else"


@pytest.mark.parametrize("cuts", [(0, 16, 32), (0, 5, 32), (0, 1, 2, 31, 32)])
def test_gradients_of_unequal_slices_add_up_to_the_whole_batchs(cuts):
    run = make_run(train={"table_l2": 0.1})
    transform = fitted(random_log(80), run.data)
    torch.manual_seed(0)
    ranker = build_ranker(run.model, transform, "cpu")
    encoded = transform.encode(random_log(32, seed=1))
    labels = np.random.default_rng(0).integers(0, 2, (32, 1)).astype(np.float32)

    def gradients(rows: np.ndarray, slow: bool = False) -> list[torch.Tensor]:
        batch = to_batch(encoded.take(rows), labels[rows], rows=32)
        ranker.zero_grad()
        logits, pooled = ranker(batch)
        if slow:
            loss = (
                F.binary_cross_entropy_with_logits(logits, batch.labels) + 0.1 * pooled.square().sum(dim=1).mean() / 6
            )
        else:
            loss = Loss(run)(logits, pooled, batch, ranker.l2_scale)
        loss.backward()
        return [p.grad.clone() for p in ranker.parameters()]

    expected = gradients(np.arange(32), slow=True)
    slices = [gradients(np.arange(a, b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    for i, want in enumerate(expected):
        torch.testing.assert_close(sum(s[i] for s in slices), want, rtol=1e-5, atol=1e-7)


# -- a step ----------------------------------------------------------------------------------------------------------


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
        loss = train_step(model, optimizer, Loss(run), batch, 1)
        twin.zero_grad()
        logits, pooled = twin(batch)
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
    run = make_run(train={"table_l2": 0})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    batch = some_batch(transform, 24)
    losses = [float(train_step(model, optimizer, Loss(run), batch, 1)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("group")
def test_steps_on_unequal_slices_add_up_to_the_whole_batch():
    # what three ranks would do one after another here: nothing moves at this rate, gradients stay in .grad
    run = make_run(train={"table_lr": 1e-12, "dense_lr": 1e-12, "table_l2": 0.1})
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    encoded = transform.encode(random_log(32, seed=1))
    labels = np.random.default_rng(0).integers(0, 2, (32, 1)).astype(np.float32)

    def step(first: int, last: int, world_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        rows = np.arange(first, last)
        batch = to_batch(encoded.take(rows), labels[rows], rows=32)
        loss = train_step(model, optimizer, Loss(run), batch, world_size)
        return loss, [p.grad.clone() for p in model.module.head.parameters()]

    whole_loss, whole = step(0, 32, 1)
    parts = [step(first, last, 3) for first, last in ((0, 3), (3, 20), (20, 32))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss)
    for i, want in enumerate(whole):
        averaged = sum(gradients[i] for _, gradients in parts) / 3  # as data-parallel training averages over ranks
        torch.testing.assert_close(averaged, want, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_stepper_calls_before_ahead_of_each_step():
    run = make_run()
    transform = fitted(random_log(80), run.data)
    model, optimizer = shard(run, transform, seed=0)
    told: list[str] = []
    stepper = Stepper(model, optimizer, Loss(run), CPU, 1, pipeline=False)
    bias = model.module.head.out.bias
    before = bias.detach().clone()

    def check() -> None:
        told.append("same" if torch.equal(bias, before) else "moved")

    for _ in stepper.steps([some_batch(transform, 8), some_batch(transform, 8, seed=2)], check):
        told.append("stepped")
    assert told == ["same", "stepped", "moved", "stepped"]
