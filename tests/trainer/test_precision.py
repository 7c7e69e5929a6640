"""trainer/precision.py: what the dense part multiplies in, and that scores are fp32 whatever it trained in."""

from __future__ import annotations

import contextlib

import pytest
import torch
from trainer_builders import CPU, fitted, make_run, random_log

from trainer import precision
from trainer.data.batch import Batch, to_batch
from trainer.models import build_ranker
from trainer.models.ranker import Ranker
from trainer.precision import choose_precision, fp32, has_bf16, precision_errors, use_precision
from trainer.worker import Place

HERE = Place(0, 1, 1, CPU)
ARCHS = ("dcn", "deepfm", "dlrm", "mmoe")
ATTENTION = [
    {"name": "item", "kind": "categorical", "dim": 4},
    {"name": "history", "kind": "sequence", "table": "item", "pooling": "attention", "max_length": 3},
    {"name": "price", "kind": "numeric"},
]


@pytest.fixture(autouse=True)
def _restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def make_ranker(features: list | None = None, **model) -> tuple[Ranker, Batch]:
    run = make_run(model={"top_mlp": [16, 8], **model}, **({} if features is None else {"features": features}))
    transform = fitted(random_log(80), run.data)
    torch.manual_seed(0)
    ranker = build_ranker(run.model.model_copy(update={"table_init": 0.5}), transform, "cpu")
    return ranker, to_batch(transform.encode(random_log(60, seed=1)))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_head_in_bf16_gives_fp32_logits_near_those_of_fp32(arch, batch_norm, training):
    ranker, batch = make_ranker(arch=arch, batch_norm=batch_norm)
    ranker.train(training)
    exact = ranker(batch)[0]
    use_precision("bf16", ranker)
    logits = ranker(batch)[0]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact), "it did multiply in bf16"
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)
    logits.sum().backward()
    assert {p.grad.dtype for p in ranker.parameters() if p.grad is not None} == {torch.float32}


def test_attention_runs_in_bf16_too():
    ranker, batch = make_ranker(ATTENTION)
    exact = ranker(batch)[0]
    use_precision("bf16", ranker)
    logits = ranker(batch)[0]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)


def test_fp32_block_scores_in_fp32_and_goes_back():
    ranker, batch = make_ranker()
    exact = ranker(batch)[0]
    use_precision("bf16", ranker)
    coarse = ranker(batch)[0]
    with fp32(ranker):
        assert torch.equal(ranker(batch)[0], exact)
    assert torch.equal(ranker(batch)[0], coarse)
    with contextlib.suppress(KeyError), fp32(ranker):
        raise KeyError
    assert torch.equal(ranker(batch)[0], coarse), "an error within does not leave it in fp32"
    use_precision("medium", ranker)
    assert (torch.get_float32_matmul_precision(), ranker.head.autocast) == ("medium", None)
    with fp32(ranker):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


def test_errors_are_of_the_spread_of_the_log_odds():
    ranker, _ = make_ranker()
    errors = precision_errors(ranker.head, 3, ranker.width, ["highest", "bf16"], CPU)
    assert errors["highest"] == 0
    assert 1e-4 < errors["bf16"] < 0.1
    with torch.no_grad():
        ranker.head.out.weight.mul_(100)
        ranker.head.out.bias.mul_(100)
    scaled = precision_errors(ranker.head, 3, ranker.width, ["bf16"], CPU)
    assert scaled["bf16"] == pytest.approx(errors["bf16"], rel=0.2)


def test_measuring_errors_leaves_the_head_as_it_was():
    ranker, batch = make_ranker(dropout=0.5)
    ranker.head.autocast = torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    before = {k: v.clone() for k, v in ranker.head.state_dict().items()}
    random = torch.get_rng_state()
    precision_errors(ranker.head, 3, ranker.width, ["bf16", "medium"], CPU)
    assert ranker.head.training
    assert (ranker.head.autocast, torch.get_float32_matmul_precision()) == (torch.bfloat16, "medium")
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in ranker.head.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_precision_asked_for_is_taken_unmeasured():
    ranker, _ = make_ranker()
    for asked in ("highest", "medium", "bf16"):
        assert choose_precision(asked, ranker.head, 3, ranker.width, HERE) == asked


@pytest.mark.parametrize(
    ("bf16", "limit", "chosen"), [(False, 1.0, "highest"), (True, 1.0, "bf16"), (True, -1.0, "highest")]
)
def test_auto_takes_the_fastest_whose_error_passes(monkeypatch, bf16, limit, chosen):
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(precision, "MAX_ERROR", limit)
    ranker, _ = make_ranker()
    assert choose_precision("auto", ranker.head, 3, ranker.width, HERE) == chosen


def test_auto_is_within_its_error_on_this_machine():
    ranker, _ = make_ranker()
    chosen = choose_precision("auto", ranker.head, 3, ranker.width, HERE)
    if has_bf16(CPU):
        assert precision_errors(ranker.head, 3, ranker.width, [chosen], CPU)[chosen] <= precision.MAX_ERROR
    else:
        assert chosen == "highest"
