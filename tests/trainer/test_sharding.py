"""trainer/sharding.py: every table whole on a rank, or one line that says why not."""

from __future__ import annotations

import pytest
from trainer_builders import CPU, fitted, make_run, random_log

from trainer import sharding
from trainer.errors import ConfigError
from trainer.models import build_ranker
from trainer.sharding import describe_plan, make_plan


@pytest.mark.usefixtures("group")
def test_plan_places_every_table_whole():
    run = make_run()
    transform = fitted(random_log(80), run.data)
    model = build_ranker(run.model, transform)
    plan = make_plan(model, transform, CPU, world_size=1, local_world_size=1, batch_size=8)
    assert describe_plan(plan) == {t: {"sharding_type": "table_wise", "ranks": [0]} for t in transform.tables}


@pytest.mark.usefixtures("group")
def test_tables_that_do_not_fit_are_refused_naming_the_largest(monkeypatch):
    monkeypatch.setattr(sharding, "machine_memory_bytes", lambda: 2_000)
    run = make_run()
    transform = fitted(random_log(80), run.data)
    model = build_ranker(run.model, transform)
    with pytest.raises(
        ConfigError, match=r"tables do not fit 1 worker\(s\): the largest, hashed, takes 0\.00 GB"
    ) as error:
        make_plan(model, transform, CPU, world_size=1, local_world_size=1, batch_size=8)
    assert len(str(error.value).splitlines()) == 1


def test_machine_memory_is_that_of_a_real_machine():
    assert 2**28 < sharding.machine_memory_bytes() < 2**50
