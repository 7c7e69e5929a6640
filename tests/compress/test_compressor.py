"""compress/compressor.py and compress/pipeline.py: plans resolved, bytes predicted, refusals that leave nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_builders import World, build_world, quiet, save_random_checkpoint
from safetensors.torch import load_file

from compress.artifact import Artifact, load_artifact
from compress.compressor import compress, data_of, resolve, table_bytes
from compress.config import CompressionPlan, TablePlan, TierPlan
from compress.errors import PlanError
from compress.ids import target_rows
from compress.lookup import pieces_of, tier_views
from compress.methods.codec import dequantize_rows
from compress.methods.prune import Score
from compress.model import score_split
from compress.pipeline import compress_checkpoint
from compress.search.profile import UNSEEN_WEIGHT, TableProfile, profile_tables
from trainer.data.transform import read_arrow
from trainer.errors import DataError, SlimrankError


def tier(bits: int, **cut: Any) -> TierPlan:
    """A tier of a plan."""
    return TierPlan(bits=bits, **cut)  # type: ignore[arg-type]


PLANS = {
    "int8": CompressionPlan(),
    "fp32": CompressionPlan(default=TablePlan(bits=32)),
    "int4, half the rows": CompressionPlan(default=TablePlan(bits=4, keep=0.5)),
    "all pruned": CompressionPlan(default=TablePlan(bits=16, keep=1e-9)),
    "tiers": CompressionPlan(default=TablePlan(tiers=(tier(16, keep=0.1), tier(8, coverage=0.5), tier(4, keep=0.6)))),
    "forgotten": CompressionPlan(default=TablePlan(bits=4, keep=0.4, unknown="shared")),
    "centroids": CompressionPlan(default=TablePlan(tiers=(tier(8, rows=9), tier(4, keep=0.3)), centroids=4)),
    "centroids by norm": CompressionPlan(order="norm", default=TablePlan(bits=8, keep=0.3, centroids=2)),
    "bits 0, forgotten": CompressionPlan(
        default=TablePlan(tiers=(tier(4, keep=0.2), tier(0, keep=0.6)), unknown="shared", centroids=4)
    ),
    "mean, forgotten": CompressionPlan(
        default=TablePlan(tiers=(tier(4, keep=0.2), tier(0, keep=0.6)), unknown="shared")
    ),
    "all read centroids": CompressionPlan(default=TablePlan(tiers=(tier(0),), centroids=4)),
    "narrow": CompressionPlan(tables={"user_id": TablePlan(bits=4, rank=8, keep=0.5), "city": TablePlan(columns=8)}),
    "hash table pruned alone": CompressionPlan(tables={"city": TablePlan(bits=4, coverage=0.5)}),
}


@functools.cache
def profiles_of(world: World, order: Score) -> dict[str, TableProfile]:
    """Profiles ranked so, with codebooks of two and four centroids."""
    return profile_tables(world.checkpoint, world.dataset, quiet, order, codebooks=(2, 4))


def write_plan(world: World, name: str, out: Path) -> dict[str, Any]:
    """Write the artifact of one of PLANS and return its manifest."""
    plan = PLANS[name]
    return compress(world.checkpoint, world.dataset, plan, out, profiles_of(world, plan.order), quiet)


def bytes_of_ids(folder: Path) -> int:
    """Bytes of what ids.arrow packs."""
    return sum(len(packed.as_py()) for packed in read_arrow(folder / "ids.arrow")["packed"])


def bits_of(manifest: dict[str, Any]) -> set[int]:
    """Bits of all tiers of an artifact."""
    return {tier["bits"] for table in manifest["tables"] for tier in table["tiers"]}


# -- resolve ---------------------------------------------------------------------------------------------------------


def test_resolve_keeps_every_row_of_an_unpruned_plan(world: World) -> None:
    for name, table in resolve(CompressionPlan(), world.profiles).items():
        rows = world.dataset.transform.tables[name].num_embeddings
        assert (table.layout.kept, table.stored.rows, len(table.centroids)) == (rows, rows, 0)
        assert table.layout.untouched


def test_resolve_adds_a_centroid_to_a_pruned_table(world: World) -> None:
    resolved = resolve(CompressionPlan(tables={"user_id": TablePlan(keep=0.3)}), world.profiles)
    assert len(resolved["user_id"].centroids) == resolved["user_id"].stored.centroids == 1
    assert resolved["user_id"].stored.rows == resolved["user_id"].layout.kept + 1 < 182
    assert len(resolved["item_id"].centroids) == 0


def test_resolve_refuses_an_unknown_table(world: World) -> None:
    with pytest.raises(PlanError, match=r"table 'movie'.*user_id, item_id"):
        resolve(CompressionPlan(tables={"movie": TablePlan()}), world.profiles)


def test_resolve_refuses_a_dim_that_cannot_be_packed(world: World) -> None:
    with pytest.raises(PlanError, match=r"table city: embedding_dim 12 .*INT2.*use more bits"):
        resolve(CompressionPlan(tables={"city": TablePlan(bits=2)}), world.profiles)


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_resolve_refuses_a_tier_that_cannot_be_packed(world: World) -> None:
    plan = CompressionPlan(tables={"city": TablePlan(tiers=(tier(8, keep=0.1), tier(2, keep=0.5)))})
    with pytest.raises(PlanError, match=r"table city: embedding_dim 12 .*INT2.*use more bits"):
        resolve(plan, world.profiles)


def test_resolve_joins_tiers_of_like_bits_and_leaves_out_those_without_rows(world: World) -> None:
    def tiers(*asked: TierPlan, table: str = "user_id") -> list[tuple[int, int]]:
        plan = CompressionPlan(tables={table: TablePlan(tiers=asked)})
        part = resolve(plan, world.profiles)[table]
        assert part.layout.kept == sum(t.rows for t in part.stored.tiers) - len(part.centroids)
        return [(t.rows, t.bits) for t in part.stored.tiers]

    assert tiers(tier(8, rows=10), tier(8)) == [(182, 8)]
    profile = world.profiles["user_id"]
    ten, half = profile.cut(tier(8, rows=10)), profile.cut(tier(8, keep=0.5))
    assert 10 <= ten < half < 182
    assert tiers(tier(8, rows=10), tier(4, keep=0.5)) == [(ten + 1, 8), (half - ten, 4)]  # the centroid is in the first
    assert tiers(tier(8, keep=0.5), tier(4, rows=10), tier(2)) == [(half, 8), (182 - half, 2)]
    assert tiers(tier(8, keep=0.5), tier(4, rows=10)) == [(half + 1, 8)]
    assert tiers(tier(16, keep=1e-9), tier(4, rows=181)) == [(2, 16), (180, 4)]  # a cut of one row saves none


def test_resolve_takes_the_largest_codebook_of_so_many_centroids(world: World) -> None:
    """Ten genres have rows enough for two centroids, and none of 3 or 5 was fitted."""
    profiles = profiles_of(world, "frequency")
    stored = {c: resolve(cut_to(7, c), profiles)["genres"].stored for c in (1, 2, 5, 256)}
    assert [(t.rows, t.centroids) for t in stored.values()] == [(8, 1), (9, 2), (9, 2), (9, 2)]
    users = {c: resolve(cut_to(50, c), profiles)["user_id"] for c in (1, 2, 5, 256)}
    assert [len(u.centroids) for u in users.values()] == [1, 2, 4, 4]
    for count, part in users.items():
        assert part.stored.rows == part.layout.kept + len(part.centroids)
        assert len(part.layout.clusters) == (0 if count == 1 else 182)


def cut_to(rows: int, centroids: int) -> CompressionPlan:
    """A plan that keeps so many rows of each table."""
    return CompressionPlan(default=TablePlan(rows=rows, centroids=centroids))


def test_resolve_sets_apart_what_many_lookups_read(world: World) -> None:
    """Reserved rows and centroids are a tier of 8 bits where the rows have fewer and are not all in one tier."""

    def tiers(plan: TablePlan) -> list[tuple[int, int]]:
        part = resolve(CompressionPlan(tables={"user_id": plan}), profiles_of(world, "frequency"))["user_id"]
        return [(t.rows, t.bits) for t in part.stored.tiers]

    cut = world.profiles["user_id"].cut(TablePlan(keep=0.5))
    assert tiers(TablePlan(bits=4)) == [(182, 4)]
    assert tiers(TablePlan(bits=4, keep=0.5)) == [(3, 8), (cut - 2, 4)]
    assert tiers(TablePlan(bits=4, keep=0.5, centroids=4)) == [(6, 8), (cut - 2, 4)]
    assert tiers(TablePlan(bits=4, keep=0.5, unknown="shared")) == [(2, 8), (cut - 2, 4)]
    assert tiers(TablePlan(bits=8, keep=0.5)) == [(cut + 1, 8)]
    assert tiers(TablePlan(tiers=(tier(0),), centroids=4)) == [(6, 8)]
    assert tiers(TablePlan(tiers=(tier(2, keep=1e-9), tier(0)), centroids=4)) == [(6, 8)]


def test_resolve_of_bits_0_reads_centroids_up_to_its_cut_and_forgets_the_others(world: World) -> None:
    profile = profiles_of(world, "frequency")["user_id"]
    ends = [profile.cut(TablePlan(keep=k)) for k in (0.2, 0.6)]
    for unknown, zone in (("own", 182), ("shared", ends[1])):
        asked = TablePlan(tiers=(tier(4, keep=0.2), tier(0, keep=0.6)), unknown=unknown, centroids=4)  # type: ignore[arg-type]
        part = resolve(CompressionPlan(tables={"user_id": asked}), profiles_of(world, "frequency"))["user_id"]
        assert (part.layout.kept, part.layout.zone, part.layout.count) == (ends[0], zone, 4)
        assert (part.unknown is None) == (unknown == "own")


def test_compress_refuses_a_plan_for_another_checkpoint(world: World, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"for checkpoint another, .*{world.checkpoint.version}.*remove `checkpoint`"):
        world.compress(CompressionPlan(checkpoint="another"), tmp_path / "a")
    world.compress(CompressionPlan(checkpoint=world.checkpoint.version), tmp_path / "a")
    assert load_artifact(tmp_path / "a").manifest["plan"]["checkpoint"] == world.checkpoint.version


@pytest.mark.parametrize("name", PLANS)
def test_manifest_holds_a_plan_that_can_be_read_again(world: World, name: str, tmp_path: Path) -> None:
    manifest = write_plan(world, name, tmp_path / "a")
    assert CompressionPlan.model_validate(manifest["plan"]) == PLANS[name]
    tables = load_artifact(tmp_path / "a").model.lookup.tables
    assert tables == [r.stored for r in resolve(PLANS[name], profiles_of(world, PLANS[name].order)).values()]


@pytest.mark.parametrize("name", PLANS)
def test_predicted_bytes_are_those_written(world: World, tmp_path: Path, name: str) -> None:
    manifest = write_plan(world, name, tmp_path / "a")
    profiles = profiles_of(world, PLANS[name].order)
    predicted = table_bytes(resolve(PLANS[name], {n: p.slim() for n, p in profiles.items()}))
    actual = (tmp_path / "a" / "tables.bin").stat().st_size + bytes_of_ids(tmp_path / "a")
    if (tmp_path / "a" / "decoders.safetensors").exists():
        decoders = load_file(tmp_path / "a" / "decoders.safetensors")
        actual += sum(4 * decoder.numel() for decoder in decoders.values())
    assert predicted == manifest["sizes"]["table_bytes"] == actual
    assert manifest["sizes"]["table_bytes_fp32"] == 4 * (182 * 16 + 161 * 8 + 10 * 8 + 202 * 12 + 14 * 4)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert manifest["sizes"]["artifact_bytes"] == on_disk


@pytest.mark.parametrize("name", PLANS)
def test_compress_packs_each_row_where_its_id_points(world: World, name: str, tmp_path: Path) -> None:
    """Row by row from the checkpoint: kept rows are their own code in their tier, cut ones a mean's."""
    write_plan(world, name, tmp_path / "a")
    model, profiles = load_artifact(tmp_path / "a").model, profiles_of(world, PLANS[name].order)
    resolved = resolve(PLANS[name], profiles)
    tables = model.lookup.tables
    for index, (table, views) in enumerate(zip(tables, tier_views(model.lookup.block, tables), strict=True)):
        part, profile = resolved[table.name], profiles[table.name]
        assert tables[index] == part.stored
        weight = world.checkpoint.read(f"tables/{table.name}/weight")
        target = target_rows(world.dataset.transform.id_maps[table.name], part.layout)
        own = sum(len(v) for v in views) - len(part.centroids)
        assert own == part.layout.kept
        wanted = weight[profile.order].clone()
        kept, zone = part.layout.kept, part.layout.zone
        if len(part.layout.clusters):
            book = profile.codebooks[part.layout.count]
            wanted[kept:zone] = torch.from_numpy(book.centroids[book.numbers[profile.order[kept:zone]]])
        elif kept < zone:
            wanted[kept:zone] = torch.from_numpy(naive_mean(world, table.name, profile.order[kept:zone]))
        if zone < len(wanted):
            wanted[0] = wanted[zone:] = torch.from_numpy(naive_fallback(world, profile, zone))
        place = target[profile.order]
        shared = np.arange(len(place)) >= part.layout.kept
        shared[0] |= zone < len(place)
        for tier, first in enumerate(table.firsts):
            for exact in (True, False):
                ranks = np.flatnonzero((shared != exact) & (place >= first) & (place < first + len(views[tier])))
                found, expected = views[tier][place[ranks] - first], part.code(wanted[ranks], tier)
                if exact:
                    assert torch.equal(found, expected), (table.name, tier)
                    continue
                decoded = [dequantize_rows(c, table.width, table.tiers[tier].bits) for c in (found, expected)]
                torch.testing.assert_close(*decoded, rtol=0.01, atol=0.01)


def naive_mean(world: World, table: str, rows: np.ndarray) -> np.ndarray:
    """The mean of some training rows by lookups."""
    weights = np.maximum(world.dataset.counts(table)[rows].astype(np.float64), UNSEEN_WEIGHT)
    values = world.checkpoint.read(f"tables/{table}/weight").double().numpy()[rows]
    return (weights @ values / weights.sum()).astype(np.float32)


def naive_fallback(world: World, profile: TableProfile, zone: int) -> np.ndarray:
    """The mean of the rows that are forgotten and of the unknown ids' row, by lookups."""
    table, rows = profile.info.name, profile.order[zone:]
    weights = np.maximum(world.dataset.counts(table)[rows].astype(np.float64), UNSEEN_WEIGHT)
    values = world.checkpoint.read(f"tables/{table}/weight").double().numpy()
    total = weights @ values[rows] + profile.unknown * values[0]
    return (total / (weights.sum() + profile.unknown)).astype(np.float32)


def test_compress_in_chunks_writes_the_same_bytes(
    world: World, artifact: Artifact, plan: CompressionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.READ_ROWS", 17)
    world.compress(plan, tmp_path / "a")
    assert (tmp_path / "a" / "tables.bin").read_bytes() == (artifact.folder / "tables.bin").read_bytes()


def test_compress_twice_gives_the_same_version(
    world: World, artifact: Artifact, plan: CompressionPlan, tmp_path: Path
) -> None:
    assert world.compress(plan, tmp_path / "a")["version"] == artifact.version
    other = world.compress(CompressionPlan(), tmp_path / "b")["version"]
    assert other != artifact.version


def test_compress_records_where_it_came_from(world: World, artifact: Artifact, plan: CompressionPlan) -> None:
    manifest = artifact.manifest
    assert manifest["lineage"] == {
        "checkpoint": world.checkpoint.version,
        "fingerprint": world.dataset.transform.fingerprint(),
        "samples": world.dataset.rows("train"),
    }
    assert CompressionPlan.model_validate(manifest["plan"]) == plan
    assert manifest["name"] == "small"


def test_compress_reports_each_table(world: World, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compress(
        world.checkpoint,
        world.dataset,
        CompressionPlan(),
        tmp_path / "a",
        world.profiles,
        lambda *step: told.append(step),
    )
    assert told == [("pack", i, 5) for i in range(1, 6)]


def test_compressed_table_without_padding_is_smaller_than_the_fp32_one(world: World) -> None:
    """The figure that the README quotes counts alignment: it cannot be below the rows alone."""
    resolved = resolve(CompressionPlan(default=TablePlan(bits=4)), world.profiles)
    rows = sum(r.stored.bytes for r in resolved.values())
    padded = pieces_of([r.stored for r in resolved.values()])[1]
    assert rows <= padded < rows + 128 * len(resolved)
    assert table_bytes(resolved) - padded == sum(r.id_map_bytes for r in resolved.values()) > 0


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of another log."""
    return build_world(tmp_path_factory.mktemp("stranger"), rows=900, seed=3)


def test_compress_refuses_data_of_another_fingerprint(world: World, stranger: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not the prepared data.*--data"):
        compress(world.checkpoint, stranger.dataset, CompressionPlan(), tmp_path / "a", world.profiles, quiet)
    assert list(tmp_path.iterdir()) == []


def test_data_of_a_checkpoint_sees_any_fitted_number(world: World) -> None:
    data_of(world.checkpoint, world.dataset)
    transform = world.dataset.transform
    age = dataclasses.replace(transform.numerics["age"], mean=transform.numerics["age"].mean + 1e-9)
    changed = type(transform)(transform.schema, transform.tables, transform.id_maps, {**transform.numerics, "age": age})
    with pytest.raises(DataError, match=str(world.dataset.folder)):
        data_of(world.checkpoint, dataclasses.replace(world.dataset, transform=changed))


@pytest.mark.parametrize(
    "plan",
    [
        CompressionPlan(tables={"movie": TablePlan()}),
        CompressionPlan(tables={"city": TablePlan(bits=2)}),
        CompressionPlan(tables={"city": TablePlan(tiers=(tier(8, keep=0.5), tier(2)))}),
        CompressionPlan(checkpoint="another"),
    ],
)
def test_compress_with_a_bad_plan_writes_nothing(world: World, tmp_path: Path, plan: CompressionPlan) -> None:
    with pytest.raises(PlanError):
        world.compress(plan, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_a_folder_that_holds_something(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(SlimrankError, match=r"already there and not empty"):
        world.compress(CompressionPlan(), out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (out / "mine.txt").read_text() == "keep me"


def test_compress_refuses_an_artifact_that_is_there(world: World, tmp_path: Path) -> None:
    world.compress(CompressionPlan(), tmp_path / "a")
    version = load_artifact(tmp_path / "a").version
    with pytest.raises(SlimrankError, match="already there"):
        world.compress(CompressionPlan(default=TablePlan(bits=4)), tmp_path / "a")
    assert load_artifact(tmp_path / "a").version == version


@pytest.mark.parametrize("existing", [False, True])
def test_compress_that_fails_half_way_leaves_nothing(world: World, tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "a"
    if existing:
        out.mkdir()

    def fail(_what: str, step: int, _total: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(world.checkpoint, world.dataset, CompressionPlan(), out, world.profiles, fail)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if existing else [])
    assert not existing or list(out.iterdir()) == []


def test_compress_into_an_empty_folder_is_fine(world: World, tmp_path: Path) -> None:
    world.compress(CompressionPlan(), tmp_path)
    assert load_artifact(tmp_path).model.tasks == ["click"]


# -- the command's work ----------------------------------------------------------------------------------------------


def test_compress_checkpoint_tells_sizes_and_quality(world: World, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("default: {bits: 4, keep: 0.5}\n")
    told = compress_checkpoint(world.checkpoint.folder, world.dataset.folder, plan, tmp_path / "a", "test", quiet)
    artifact = load_artifact(tmp_path / "a")
    assert told["version"] == artifact.version
    assert told["artifact"] == str(tmp_path / "a")
    assert told["table_bytes"] < told["table_bytes_fp32"]
    labels, logits = score_split(artifact.model, world.dataset, "test")
    _, reference = score_split(world.fp32, world.dataset, "test")

    def loss(z: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, z) - labels * z))

    assert told["delta_ne"] == pytest.approx(loss(logits) / loss(reference) - 1, rel=1e-4)
    assert told["delta_ne_upper"] > told["delta_ne"]


def test_compress_checkpoint_without_a_plan_is_int8(world: World, tmp_path: Path) -> None:
    compress_checkpoint(world.checkpoint.folder, world.dataset.folder, None, tmp_path / "a", "val", quiet)
    assert bits_of(load_artifact(tmp_path / "a").manifest) == {8}


def test_compress_checkpoint_refuses_before_it_writes(world: World, stranger: World, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("tables: {movie: {bits: 4}}\n")
    with pytest.raises(PlanError, match="movie"):
        compress_checkpoint(world.checkpoint.folder, world.dataset.folder, plan, tmp_path / "a", "val", quiet)
    with pytest.raises(DataError, match="trained on"):
        compress_checkpoint(world.checkpoint.folder, stranger.dataset.folder, None, tmp_path / "a", "val", quiet)
    assert not (tmp_path / "a").exists()


def test_compress_checkpoint_without_a_plan_takes_the_runs_own(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run = world.run.model_copy(update={"compress": {"default": {"bits": 16}}})
    save_random_checkpoint(run, world.dataset, folder, seed=1)
    compress_checkpoint(folder, world.dataset.folder, None, tmp_path / "a", "val", quiet)
    assert bits_of(json.loads((tmp_path / "a" / "manifest.json").read_text())) == {16}
