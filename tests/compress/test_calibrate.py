"""compress/methods/calibrate.py: it repairs what compression broke, reports its control, and can be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compress_builders import World, quiet
from pydantic import ValidationError

from compress.artifact import load_artifact
from compress.compressor import ResolvedTable, resolve
from compress.config import CalibrationPlan, CompressionPlan, TablePlan
from compress.errors import PlanError
from compress.methods.calibrate import Calibration, calibrate, fine_tune, held_loss, reading, with_head
from compress.pipeline import compress_checkpoint
from compress.search.working_set import WorkingSet, extract, score
from trainer.data.reader import read_split
from trainer.files import write_json

ASKED = CalibrationPlan(steps=40, batch_size=256, lr=3e-3, evaluations=4)


@dataclass(frozen=True)
class Samples:
    """Training and held rows of a world, and a plan that hurts it."""

    train: WorkingSet
    held: WorkingSet
    resolved: Mapping[str, ResolvedTable]

    def calibrated(self, plan: CalibrationPlan) -> Calibration:
        """What `calibrate` finds."""
        return calibrate(self.train, self.held, self.resolved, plan, 1.0, quiet)


def samples_of(world: World, keep: float) -> Samples:
    """Samples of a world whose tables keep a share of their rows."""
    train, held = (
        extract(world.checkpoint, world.dataset.transform, world.profiles, read_split(world.dataset, split))
        for split in ("train", "val")
    )
    plan = CompressionPlan(default=TablePlan(bits=8, keep=keep))
    return Samples(train, held, resolve(plan, world.profiles))


def relabelled(working: WorkingSet) -> WorkingSet:
    """The same rows with labels drawn from the fp32 model's probabilities, so that it is the best model there is."""
    chance = 1 / (1 + np.exp(-score(working, None).astype(np.float64)))
    drawn = np.random.default_rng(0).random(chance.shape) < chance
    return replace(working, labels=drawn.astype(np.float32))


@pytest.fixture(scope="module")
def samples(world: World) -> Samples:
    """Rows as they are: the head of random weights was never trained on their labels."""
    return samples_of(world, 0.02)


def halved(samples: Samples) -> Samples:
    """Labels that the fp32 model knows as well as they can be known, and tables that store half of each value: what a
    head can repair in full."""
    parts = {
        name: replace(part, encoder=0.5 * np.eye(part.stored.dim, dtype=np.float32))
        for name, part in samples.resolved.items()
    }
    return Samples(relabelled(samples.train), relabelled(samples.held), parts)


def test_calibrate_brings_logits_closer_to_the_teacher(world: World) -> None:
    samples = halved(samples_of(world, 1.0))
    found = samples.calibrated(ASKED.model_copy(update={"target": "teacher"}))
    reference = score(samples.train, None)
    before = np.square(score(samples.train, samples.resolved) - reference).mean()
    tuned = with_head(samples.train, found.compressed.dense)
    after = np.square(score(tuned, samples.resolved) - reference).mean()
    assert found.compressed.step > 0
    assert after < 0.5 * before


def test_calibrate_lowers_the_held_loss_and_says_so(samples: Samples) -> None:
    found = samples.calibrated(ASKED.model_copy(update={"target": "labels"})).compressed
    held = reading(with_head(samples.held, found.dense), samples.resolved)
    assert (
        found.after
        < found.before
        == held_loss(reading(samples.held, samples.resolved).model.head, reading(samples.held, samples.resolved))
    )
    assert held_loss(held.model.head, held) == pytest.approx(found.after, rel=1e-12)


def test_control_reads_fp32_tables_and_gains_from_labels_alone(samples: Samples) -> None:
    by_labels = samples.calibrated(ASKED.model_copy(update={"target": "labels"})).control
    by_teacher = samples.calibrated(ASKED.model_copy(update={"target": "teacher"})).control
    fp32 = reading(samples.held, None)
    assert by_labels.before == by_teacher.before == held_loss(fp32.model.head, fp32)
    assert by_labels.after < by_labels.before  # the head of random weights was never trained
    assert by_teacher.before - by_teacher.after < 0.1 * (by_labels.before - by_labels.after)  # it is its own teacher


def test_calibrate_changes_the_head_alone(samples: Samples) -> None:
    state = {key: value.copy() for key, value in samples.train.dense.items()}
    weights = {key: value.copy() for key, value in samples.train.weights.items()}
    samples.calibrated(ASKED)
    assert all(np.array_equal(value, samples.train.dense[key]) for key, value in state.items())
    assert all(np.array_equal(value, samples.train.weights[key]) for key, value in weights.items())


def test_calibrate_is_repeatable_and_depends_on_its_seed(samples: Samples) -> None:
    first, again = samples.calibrated(ASKED).compressed, samples.calibrated(ASKED).compressed
    other = samples.calibrated(ASKED.model_copy(update={"seed": 1})).compressed
    assert all(torch.equal(first.dense[key], again.dense[key]) for key in first.dense)
    assert any(not torch.equal(first.dense[key], other.dense[key]) for key in first.dense)


def test_calibrate_leaves_the_random_state_of_the_caller_alone(samples: Samples) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    samples.calibrated(ASKED.model_copy(update={"steps": 2}))
    assert torch.equal(torch.rand(3), expected)


def test_calibrate_keeps_the_first_state_where_no_step_helps(samples: Samples) -> None:
    """Steps this large ruin the head on held rows; what is returned is what compression left."""
    found = samples.calibrated(CalibrationPlan(steps=3, batch_size=64, lr=3.0, evaluations=3)).compressed
    assert found.step == 0
    assert found.after == found.before
    assert all(np.array_equal(value.numpy(), samples.train.dense[key]) for key, value in found.dense.items())


def test_calibrate_of_two_tasks_learns_both(two_tasks: World) -> None:
    samples = halved(samples_of(two_tasks, 1.0))
    found = samples.calibrated(ASKED.model_copy(update={"target": "teacher"})).compressed
    reference = score(samples.train, None)
    before = np.square(score(samples.train, samples.resolved) - reference).mean(0)
    after = np.square(score(with_head(samples.train, found.dense), samples.resolved) - reference).mean(0)
    assert (after < before).all()


def test_calibrate_refuses_a_loss_that_is_not_finite(samples: Samples) -> None:
    with pytest.raises(PlanError, match="use a smaller lr than 1e"):
        samples.calibrated(CalibrationPlan(steps=4, batch_size=64, lr=1e30))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0}, {"alpha": 1}, {"target": "students"}, {"speed": 3}])
def test_calibration_plan_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CalibrationPlan.model_validate(wrong)


def test_compress_writes_the_calibrated_head_and_reports_its_control(world: World, tmp_path: Path) -> None:
    plan = {"default": {"bits": 8, "keep": 0.02}, "calibrate": {"steps": 20, "batch_size": 128, "lr": 0.003}}
    write_json(tmp_path / "plan.yaml", plan)
    out = tmp_path / "artifact"
    found = compress_checkpoint(
        world.checkpoint.folder, world.dataset.folder, tmp_path / "plan.yaml", out, "val", quiet
    )
    written = load_artifact(out)
    assert any(
        not torch.equal(value, written.model.head.state_dict()[key])
        for key, value in world.checkpoint.dense_state().items()
    )
    told = written.manifest["metrics"]["calibration"]
    assert set(told) == {"compressed", "control"}
    assert told["compressed"]["held_loss"] < told["compressed"]["held_loss_before"]
    assert set(found["calibration"]) == {"compressed", "control", "control_against_fp32", "against_control"}
    assert found["calibration"]["control_against_fp32"]["delta_ne"] != found["delta_ne"]


def test_fine_tune_of_one_model_is_its_half_of_a_calibration(samples: Samples) -> None:
    plan = ASKED.model_copy(update={"steps": 12, "target": "both"})
    both = samples.calibrated(plan)
    for resolved, expected in ((samples.resolved, both.compressed), (None, both.control)):
        found = fine_tune(samples.train, samples.held, resolved, plan, 1.0, score(samples.train, None))
        assert (found.step, found.before, found.after) == (expected.step, expected.before, expected.after)
        assert all(torch.equal(found.dense[k], v) for k, v in expected.dense.items())


def test_fine_tune_leaves_the_draws_of_others_alone(samples: Samples) -> None:
    teacher = score(samples.train, None)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fine_tune(samples.train, samples.held, None, ASKED.model_copy(update={"steps": 2}), 1.0, teacher)
    assert torch.equal(torch.rand(4), expected)
