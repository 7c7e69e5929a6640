"""compress/config.py: plans and searches as values, and how their mistakes are told."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.config import CompressionPlan, SearchConfig, TablePlan, load_plan
from compress.errors import ArtifactError, PlanError
from trainer.errors import ConfigError, SlimrankError


def written(tmp_path: Path, text: str) -> Path:
    """A plan file with this text."""
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_plan_of_a_table_is_its_own_or_the_default() -> None:
    plan = CompressionPlan(default=TablePlan(bits=4), tables={"a": TablePlan(bits=2, keep=0.5)})
    assert plan.of("a") == TablePlan(bits=2, keep=0.5)
    assert plan.of("b") == TablePlan(bits=4)


def test_load_plan_reads_what_was_dumped(tmp_path: Path) -> None:
    path = written(tmp_path, "default: {bits: 4, coverage: 0.9}\ntables:\n  a: {bits: 2, keep: 0.25}\n")
    expected = CompressionPlan(default=TablePlan(bits=4, coverage=0.9), tables={"a": TablePlan(bits=2, keep=0.25)})
    assert load_plan(path) == expected
    assert CompressionPlan.model_validate(expected.model_dump(mode="json")) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("default: {bits: 3}", "default.bits"),
        ("default: {bits: '8 '}", "default.bits"),
        ("default: {keep: 0}", "default.keep"),
        ("default: {keep: 1.5}", "default.keep"),
        ("tables: {a: {coverage: -1}}", "tables.a.coverage"),
        ("tables: {a: {keep: 0.5, coverage: 0.5}}", "give one of keep"),
        ("default: {bit: 8}", "default.bit"),
        ("version: 2", "version"),
        ("tables: [a]", "tables"),
        ("{default: {bits: 3}, tables: {a: {keep: 2}}}", "default.bits.*tables.a.keep"),
    ],
)
def test_load_plan_names_what_is_wrong(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PlanError, match=f"(?s)plan.yaml.*{named}"):
        load_plan(path)


@pytest.mark.parametrize("text", ["", "- a", "default: {", "42"])
def test_load_plan_refuses_what_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="plan.yaml"):
        load_plan(written(tmp_path, text))


def test_load_plan_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("coverage", [(0.0,), (1.0, 1.1), (-0.5,)])
def test_search_refuses_coverage_that_is_no_share(coverage: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="share of lookups"):
        SearchConfig(coverage=coverage)


@pytest.mark.parametrize("empty", [{"bits": ()}, {"coverage": ()}])
def test_search_refuses_an_empty_grid(empty: dict[str, tuple]) -> None:
    with pytest.raises(ValidationError):
        SearchConfig(**empty)


def test_plans_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CompressionPlan().default = TablePlan()  # type: ignore[misc]


@pytest.mark.parametrize("kind", [PlanError, ArtifactError])
def test_compress_errors_survive_pickling(kind: type[SlimrankError]) -> None:
    error = pickle.loads(pickle.dumps(kind("table a: too many bits")))
    assert type(error) is kind
    assert str(error) == "table a: too many bits"
    assert isinstance(error, SlimrankError)
