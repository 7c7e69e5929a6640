"""compress/config.py: plans and searches as values, and how their mistakes are told."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from compress.config import CompressionPlan, SearchConfig, TablePlan, TierPlan, load_plan
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
        ("tables: {a: {rows: 9, coverage: 0.5}}", "tables.a.*give one of keep"),
        ("tables: {a: {rows: 0}}", "tables.a.rows"),
        ("default: {bit: 8}", "default.bit"),
        ("default: {tiers: [{keep: 0.5}]}", "default.tiers.0.bits"),
        ("default: {tiers: [{bits: 8, keep: 0.1, rows: 5}]}", "default.tiers.0.*give one of keep"),
        ("default: {tiers: [{bits: 8, keep: 0}]}", "default.tiers.0.keep"),
        ("default: {tiers: [{bits: 8, clip: best}]}", "default.tiers.0.clip"),
        ("default: {tiers: [{bits: 4, keep: 0.5}, {bits: 8}]}", r"default: tiers \[4, 8\]: later ones have fewer bits"),
        ("default: {bits: 8, tiers: [{bits: 8}]}", "default: give tiers, or bits"),
        ("default: {keep: 0.5, tiers: [{bits: 8}]}", "default: give tiers, or bits"),
        ("default: {coverage: 1.0, tiers: [{bits: 8}]}", "default: give tiers, or bits"),
        ("default: {rows: 5, tiers: [{bits: 8}]}", "default: give tiers, or bits"),
        ("default: {clip: best}", "default.clip.*minmax.*search"),
        ("default: {centroids: 0}", "default.centroids"),
        ("default: {centroids: 257}", "default.centroids"),
        ("default: {bits: 0}", "default.bits"),
        ("default: {tiers: [{bits: 0, keep: 0.5}, {bits: 0}]}", "default: bits 0 .* is for the last tier"),
        ("default: {unknown: lost}", "default.unknown.*own.*shared"),
        (
            "default: {unknown: shared, centroids: 2}",
            "default: unknown: .* needs a last tier of bits 0",
        ),
        ("default: {tiers: [{bits: 8, keep: 0.5}], unknown: shared, centroids: 4}", "default: .* needs a last tier"),
        ("default: {rank: 3}", "default.rank"),
        ("default: {energy: 1.0}", "default.energy"),
        ("default: {energy: 0}", "default.energy"),
        ("default: {columns: 3}", "default.columns"),
        ("default: {rank: 8, energy: 0.9}", "default: give one of rank, energy and columns"),
        ("default: {rank: 8, columns: 8}", "default: give one of rank, energy and columns"),
        ("order: length", "order.*frequency.*fisher"),
        ("checkpoint: [a]", "checkpoint"),
        ("version: 2", "version"),
        ("tables: [a]", "tables"),
        ("{default: {bits: 3}, tables: {a: {keep: 2}}}", "default.bits.*tables.a.keep"),
    ],
)
def test_load_plan_names_what_is_wrong(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PlanError, match=f"(?s)plan.yaml.*{named}"):
        load_plan(path)


PLANS = [
    "default: {tiers: [{bits: 8, keep: 0.1}, {bits: 4, coverage: 0.9}, {bits: 2, rows: 100}], unknown: shared}",
    "{order: fisher, checkpoint: abc, default: {bits: 16, rows: 5, centroids: 3, clip: minmax}}",
    "default: {tiers: [{bits: 4, rows: 9}, {bits: 0, rows: 50}], unknown: shared, centroids: 256}",
    "{order: norm, default: {tiers: [{bits: 4, rows: 9}, {bits: 0}], centroids: 16}}",
    "tables: {a: {bits: 4, rank: 8}, b: {tiers: [{bits: 4}], energy: 0.9}, c: {columns: 8, keep: 0.5}}",
    "{}",
]


@pytest.mark.parametrize("text", PLANS)
def test_plan_that_is_written_is_read_again(tmp_path: Path, text: str) -> None:
    """As a manifest, a search's trials and a plan file hold it."""
    plan = load_plan(written(tmp_path, text))
    assert CompressionPlan.model_validate(plan.model_dump(mode="json")) == plan
    assert CompressionPlan.model_validate_json(plan.model_dump_json()) == plan
    assert load_plan(written(tmp_path, yaml.safe_dump(plan.model_dump(mode="json")))) == plan


def test_tiers_of_a_plan_without_any_are_its_bits_and_cut() -> None:
    assert TablePlan(bits=4, keep=0.5).all_tiers == (TierPlan(bits=4, keep=0.5),)
    assert TablePlan(bits=2, rows=7).all_tiers == (TierPlan(bits=2, rows=7),)
    tiers = (TierPlan(bits=8, keep=0.1), TierPlan(bits=8))
    assert TablePlan(tiers=tiers).all_tiers == tiers


@pytest.mark.parametrize(
    ("plan", "whole"),
    [(TablePlan(), True), (TablePlan(keep=1.0), True), (TablePlan(keep=0.9), False), (TablePlan(rows=5), False)]
    + [(TablePlan(coverage=0.5), False), (TablePlan(coverage=1.0), False)],
)
def test_cut_that_covers_all_lookups_may_drop_rows_without_any(plan: TablePlan, whole: bool) -> None:
    assert plan.whole == whole


@pytest.mark.parametrize("text", ["", "- a", "default: {", "42"])
def test_load_plan_refuses_what_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="plan.yaml"):
        load_plan(written(tmp_path, text))


def test_load_plan_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("key", ["bits", "coverage"])
def test_search_refuses_the_keys_of_the_grid_that_was(key: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){key}.*not permitted"):
        SearchConfig(**{key: (8,)})


def test_plans_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CompressionPlan().default = TablePlan()  # type: ignore[misc]


@pytest.mark.parametrize("kind", [PlanError, ArtifactError])
def test_compress_errors_survive_pickling(kind: type[SlimrankError]) -> None:
    error = pickle.loads(pickle.dumps(kind("table a: too many bits")))
    assert type(error) is kind
    assert str(error) == "table a: too many bits"
    assert isinstance(error, SlimrankError)
