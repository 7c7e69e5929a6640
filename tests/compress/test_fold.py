"""compress/methods/fold.py: a decoder within the head scores as it did after the lookup, on every path."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_builders import World, build_world, quiet
from rich_builders import rich_world_in
from test_shared_request import make_head
from torch import Tensor

from cluster.artifacts import show_lines
from compress.artifact import Artifact, load_artifact
from compress.catalogue import item_transform, request_transform
from compress.compressor import compress, resolve, table_bytes
from compress.config import CompressionPlan
from compress.dense import GRAPH
from compress.describe import describe_artifact
from compress.methods.calibrate import held_loss, reading
from compress.methods.dense import prune_neurons
from compress.methods.fold import foldable_tables, folded_weight
from compress.model import score_split, translate_rows
from compress.pipeline import compress_checkpoint
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import sensitivities
from compress.search.working_set import extract, score
from trainer.config import ModelConfig
from trainer.data.reader import read_split
from trainer.data.transform import Transform
from trainer.files import write_json
from trainer.models import HEADS
from trainer.models.attention import SequenceHead
from trainer.models.ranker import Head

ARCHS = ("dlrm", "mmoe")
# of make_head's six features: b alone is narrower than the widest, d may be a sequence that attends to f
FOLDABLE = {"dcn": "", "deepfm": "b", "dlrm": "b", "mmoe": "abcdef"}
RANK = {"default": {"bits": 8, "rank": 8}}


def random_like(head: Head) -> Head:
    """Random weights in place of a head's, biases too."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


@functools.cache
def small(base: Path, arch: str) -> World:
    """Two tasks; dims 16, 12, 8, 8 and 4."""
    return build_world(base / f"fold-{arch}", rows=900, seed=5, tasks=("click", "buy"), arch=arch)


@pytest.fixture(scope="session", params=ARCHS)
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return small(tmp_path_factory.getbasetemp(), request.param)


@pytest.fixture(scope="session")
def mmoe(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small(tmp_path_factory.getbasetemp(), "mmoe")


@functools.cache
def profiles_of(world: World) -> dict[str, TableProfile]:
    """Profiles that know what the loss minds, so that factors are those of a metric."""
    fisher = sensitivities(world.checkpoint, world.dataset, quiet)
    return profile_tables(world.checkpoint, world.dataset, quiet, "fisher", fisher)


@functools.cache
def written(world: World, plan: str, fold: bool) -> Artifact:
    """The artifact of a plan in JSON."""
    out = Path(tempfile.mkdtemp(prefix="artifact-", dir=world.folder))
    profiles = {n: p if fold else replace(p, foldable=False) for n, p in profiles_of(world).items()}
    compress(world.checkpoint, world.dataset, CompressionPlan.model_validate_json(plan), out, profiles, quiet)
    return load_artifact(out)


def write(world: World, plan: dict[str, Any], *, fold: bool = True) -> Artifact:
    """The artifact of a plan; without `fold` as it was written before there was folding."""
    return written(world, json.dumps({"order": "fisher", **plan}), fold)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest score."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -- the property of a head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("arch", sorted(HEADS))
def test_readers_are_all_that_reads_a_feature(arch: str, sequence: bool) -> None:
    head, shape = make_head(arch, sequence)
    found = "".join(name for i, name in enumerate(shape.features) if head.linear_readers(i))
    assert found == "".join(f for f in FOLDABLE[arch] if not (sequence and f in "df"))


def folded_pair(config: ModelConfig) -> tuple[Head, Head, Callable[[int], tuple[Tensor, Tensor, Tensor]], int]:
    """A head, the same with what may be folded in it, draws of (dense, looked up, widened), and how many are folded."""
    shape = make_head(config.arch)[1]
    head = random_like(HEADS[config.arch](config, shape))
    folded = [i for i in range(6) if head.linear_readers(i)]
    widths = [3 if i in folded else dim for i, dim in enumerate(shape.dims)]
    decoders = {i: torch.randn(3, shape.dims[i]) for i in folded}
    state = head.state_dict()
    for name in {n for i in folded for n, _ in head.linear_readers(i)}:
        parts = [(start, decoders[i]) for i in folded for n, start in head.linear_readers(i) if n == name]
        state[f"{name}.weight"] = folded_weight(state[f"{name}.weight"], parts)
    small_head = HEADS[config.arch](config, replace(shape, dims=tuple(widths)))
    small_head.load_state_dict(state)

    def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        looked_up = torch.randn(rows, sum(widths))
        wide = [p @ decoders[i] if i in decoders else p for i, p in enumerate(looked_up.split(widths, dim=1))]
        return torch.randn(rows, 4), looked_up, torch.cat(wide, dim=1)

    return head, small_head.eval(), inputs, len(folded)


@pytest.mark.parametrize("layers", [[24, 16], []])
@pytest.mark.parametrize("arch", sorted(HEADS))
def test_head_of_folded_readers_equals_the_widened_head(arch: str, layers: list[int]) -> None:
    """Heads with and without hidden layers and batch norm, a DCN without crosses among them."""
    config = ModelConfig(
        arch=arch, top_mlp=layers, bottom_mlp=[16], tower_mlp=[8], experts=3, cross_layers=0, batch_norm=bool(layers)
    )
    head, small_head, inputs, count = folded_pair(config)
    assert count == {"mmoe": 6 if layers else 0, "dcn": 6 if layers else 0}.get(arch, 1)
    dense, looked_up, wide = inputs(50)
    with torch.no_grad():
        expected = head(dense, wide)
        torch.testing.assert_close(
            small_head(dense, looked_up), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_folded_head_loses_the_same_neurons() -> None:
    """What the hidden neurons do is the same, so the same ones go and the same ones stand in for them."""
    head, small_head, inputs, _ = folded_pair(ModelConfig(arch="mmoe", top_mlp=[64, 16], tower_mlp=[8], experts=2))
    dense, looked_up, wide = inputs(512)
    pruned = prune_neurons(head, [(dense, wide)], 0.5)
    small_pruned = prune_neurons(small_head, [(dense, looked_up)], 0.5)
    assert small_pruned.get_submodule("experts.0.0").weight.shape == (32, 4 + 6 * 3)
    with torch.no_grad():
        expected = pruned(dense, wide)
        assert not torch.allclose(expected, head(dense, wide), rtol=1e-2)
        torch.testing.assert_close(
            small_pruned(dense, looked_up), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def test_a_head_that_declares_nothing_folds_nothing(mmoe: World, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, model = mmoe.dataset.transform, mmoe.run.model
    assert foldable_tables(model, transform, mmoe.checkpoint.dense_state()) == set(transform.tables)
    assert foldable_tables(model, transform, {"onnx"}) == set()
    monkeypatch.setattr("trainer.models.mmoe.MMoEHead.linear_readers", Head.linear_readers)
    assert foldable_tables(model, transform, mmoe.checkpoint.dense_state()) == set()


def test_a_table_that_attention_reads_too_keeps_its_decoder(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = rich_world_in(tmp_path_factory.getbasetemp(), "mmoe")
    transform = world.dataset.transform
    foldable = {n for n, p in world.profiles.items() if p.foldable}
    shape_of = {n: transform.positions(n) for n in transform.sparse}
    attended = {transform.table_of(n).name for n, count in shape_of.items() if count is not None}
    assert attended
    assert foldable == set(transform.tables) - attended != set()
    assert isinstance(world.fp32.head, SequenceHead)


# -- artifacts -------------------------------------------------------------------------------------------------------


def test_folded_artifact_scores_as_the_one_with_decoders(narrow: World) -> None:
    plan = {"default": {"bits": 8, "rank": 8}}
    folded, plain = write(narrow, plan), write(narrow, plan, fold=False)
    names = {"user_id": 16, "city": 12} if narrow.run.model.arch == "mmoe" else {"city": 12}
    assert folded.manifest["lineage"]["folded"] == names
    assert {t.name for t in folded.model.lookup.tables if t.dim != t.width} == {"user_id", "city"} - set(names)
    assert set(plain.model.lookup.decoders) == {"user_id", "city"}
    assert set(folded.model.lookup.decoders) == {"user_id", "city"} - set(names)
    assert ("decoders.safetensors" in folded.manifest["files"]) == (len(names) == 1)
    assert plain.sizes["table_bytes"] - folded.sizes["table_bytes"] == sum(4 * 8 * d for d in names.values())
    dense = [a.manifest["files"]["dense.safetensors"]["bytes"] for a in (folded, plain)]
    assert dense[0] < dense[1]
    scores = [score_split(a.model, narrow.dataset, "val")[1] for a in (folded, plain)]
    assert relative(*scores) <= 1e-5


def test_folded_artifact_ranks_as_it_scores(narrow: World) -> None:
    model = write(narrow, RANK).model
    raw = narrow.dataset.sample().slice(0, 40)
    request = request_transform(model.transform).encode(raw.slice(0, 1))
    items = item_transform(model.transform).encode(raw)
    expected = model.score_encoded(model.transform.encode(same_request(raw, model.transform)))
    np.testing.assert_allclose(model.rank(request, items), expected, rtol=1e-5, atol=1e-5)


def same_request(raw: Any, transform: Transform) -> Any:
    """Raw rows whose request columns are the first row's."""
    for feature in transform.schema.features:
        if feature.side != "item":
            column = raw.column_names.index(feature.source)
            raw = raw.set_column(column, feature.source, raw[feature.source].take([0] * len(raw)))
    return raw


@pytest.mark.parametrize(
    "dense",
    [
        {"dtype": "int8", "max_loss": 1.0},
        {"dtype": "bf16", "max_loss": 1.0},
        {"rank": 0.9, "backend": "onnx"},
    ],
    ids=str,
)
def test_folded_decoders_go_with_every_dense_plan(mmoe: World, dense: dict[str, Any]) -> None:
    """Folded first, then made smaller, which costs the narrow head about what it costs the wide one."""
    folded, plain = (write(mmoe, {**RANK, "dense": dense}, fold=fold) for fold in (True, False))
    assert folded.model.lookup.decoders == {}
    assert (GRAPH in folded.manifest["files"]) == (dense.get("dtype") != "bf16")
    fp32, small, wide = (score_split(a.model, mmoe.dataset, "val")[1] for a in (write(mmoe, RANK), folded, plain))
    lost = [float(np.square(found - fp32).mean() ** 0.5) for found in (small, wide)]
    assert 0 < lost[0] < 2 * lost[1]
    model, raw = folded.model, mmoe.dataset.sample().slice(0, 40)
    ranked = model.rank(
        request_transform(model.transform).encode(raw.slice(0, 1)), item_transform(model.transform).encode(raw)
    )
    same = model.score_encoded(model.transform.encode(same_request(raw, model.transform)))
    assert np.abs(ranked - same).max() < 0.02


@pytest.mark.parametrize("way", ["rank", "columns"])
def test_a_table_that_cannot_be_packed_narrower_has_no_decoder(mmoe: World, way: str) -> None:
    """Four of eight columns are packed as eight: nothing is gained, and nothing is to be widened or folded."""
    plan = {"default": {"bits": 8, way: 4}}
    part = resolve(CompressionPlan.model_validate(plan), mmoe.profiles)["item_id"]
    assert (part.stored.dim, part.stored.width, part.decoder, part.folded) == (8, 8, None, False)
    assert set(write(mmoe, plan, fold=False).model.lookup.decoders) == {"user_id", "city"}


def test_show_tells_what_was_folded(mmoe: World) -> None:
    shown = describe_artifact(write(mmoe, RANK).folder)
    by_name = {t["name"]: t for t in shown["tables"]}
    assert (by_name["user_id"]["dim"], by_name["user_id"]["width"], by_name["user_id"]["folded_from"]) == (8, 8, 16)
    assert by_name["item_id"]["folded_from"] is None
    assert any("8 of 16, folded" in line for line in show_lines(shown))
    plain = describe_artifact(write(mmoe, RANK, fold=False).folder)
    assert any("8 of 16 " in line for line in show_lines(plain))


# -- trials and calibration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        RANK,
        {"default": {"bits": 4, "columns": 8, "keep": 0.5}},
        {"default": {"tiers": [{"bits": 8, "keep": 0.1}, {"bits": 4, "keep": 0.5}], "rank": 8, "centroids": 2}},
    ],
    ids=["rank", "columns", "tiers"],
)
def test_trial_of_folded_tables_scores_exactly_as_the_artifact(narrow: World, plan: dict[str, Any]) -> None:
    rows = read_split(narrow.dataset, "val").take(np.arange(0, 90, 3))
    working = extract(narrow.checkpoint, narrow.dataset.transform, profiles_of(narrow), rows)
    resolved = resolve(CompressionPlan.model_validate(plan), {n: p.slim() for n, p in profiles_of(narrow).items()})
    artifact = write(narrow, plan)
    encoded = translate_rows(artifact.model, narrow.dataset, rows.encoded)
    assert np.array_equal(score(working, resolved), artifact.model.score_encoded(encoded))
    assert table_bytes(resolved) == artifact.sizes["table_bytes"]


def test_calibrated_head_is_folded_after_it_was_tuned(mmoe: World, tmp_path: Path) -> None:
    calibrate = {"steps": 20, "batch_size": 128, "lr": 3e-3, "evaluations": 4, "rounds": 2}
    plan = {"default": {"bits": 4, "rank": 8, "keep": 0.5}, "calibrate": calibrate}
    write_json(tmp_path / "plan.yaml", plan)
    told = compress_checkpoint(
        mmoe.checkpoint.folder, mmoe.dataset.folder, tmp_path / "plan.yaml", tmp_path / "a", "val", quiet
    )
    artifact = load_artifact(tmp_path / "a")
    assert artifact.model.lookup.decoders == {}
    labels, logits = score_split(artifact.model, mmoe.dataset, "val")
    loss = np.logaddexp(0, np.where(labels > 0, -logits, logits)).mean()
    found = told["calibration"]["compressed"]
    assert found["step"] > 0
    assert loss == pytest.approx(found["held_loss"], rel=1e-5)
    assert loss < found["held_loss_before"]


def test_what_calibration_reads_is_as_wide_as_it_was_trained(mmoe: World) -> None:
    rows = read_split(mmoe.dataset, "val")
    working = extract(mmoe.checkpoint, mmoe.dataset.transform, mmoe.profiles, rows)
    resolved = resolve(CompressionPlan.model_validate({"default": {"bits": 8, "rank": 8}}), mmoe.profiles)
    whole = reading(working, resolved)
    assert set(whole.model.lookup.decoders) == {"user_id", "city"}
    logits, labels = score(working, resolved), working.labels
    loss = np.logaddexp(0, np.where(labels > 0, -logits, logits)).mean()
    assert held_loss(whole.model.head, whole) == pytest.approx(loss, rel=1e-6)  # type: ignore[arg-type]
