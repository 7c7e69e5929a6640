"""trainer/checkpoint.py: what is saved is what is loaded, whatever parts it lies in; what is altered is refused."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from trainer_builders import fitted, make_run, random_log, shard

from trainer import checkpoint as checkpoint_module
from trainer.checkpoint import (
    MANIFEST,
    Position,
    load_into,
    open_checkpoint,
    resolve,
    save_checkpoint,
    training_state,
    write_tensors,
)
from trainer.data.batch import to_batch
from trainer.data.transform import OOV_ROW
from trainer.errors import CheckpointError, SlimrankError
from trainer.files import sha256, write_json
from trainer.step import Loss, train_step

pytestmark = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)

RUN = make_run()
POSITION = Position(1, 2, 7, 9, 99, 0.9, 2, 0.1, 1, 2**64 - 3)
HEADER = {
    "run": RUN.model_dump(mode="json"),
    "fingerprint": "abc",
    "position": asdict(POSITION),
    "metrics": {"ne": 0.9},
    "plan": {},
    "world_size": 1,
}


def batch_of(transform, seed: int):
    labels = np.random.default_rng(seed).integers(0, 2, (16, 1)).astype(np.float32)
    return to_batch(transform.encode(random_log(16, seed=seed)), labels)


LOSS = Loss(make_run(train={"table_l2": 0.001}))


def local(value) -> torch.Tensor:
    return (value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value).detach().clone()


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    return {key: local(value) for key, value in training_state(model, optimizer).items()}


@pytest.fixture
def trained(group, tmp_path):
    """A model after three steps, its checkpoint's folder, and its transform."""
    transform = fitted(random_log(80), RUN.data)
    model, optimizer = shard(RUN, transform, seed=0)
    for seed in range(3):
        train_step(model, optimizer, LOSS, batch_of(transform, seed), 1)
    save_checkpoint(tmp_path / "saved", training_state(model, optimizer), HEADER, 0, 1)
    return model, optimizer, tmp_path / "saved", transform


def write_manifest(folder, manifest) -> None:
    """A manifest as `save_checkpoint` would have written it, its digest included."""
    write_json(folder / MANIFEST, {**manifest, "digest": checkpoint_module._digest(manifest)})


def cut_tables(folder, out, axis: int, cuts: list[float], ranks: int = 3):
    """The same checkpoint as several ranks would have written it: each table cut in rows or columns."""
    out.mkdir()
    manifest = json.loads((folder / MANIFEST).read_text())
    owned: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    whole = load_file(folder / "rank-00000.safetensors")
    for key, entry in manifest["tensors"].items():
        if entry["parts"][0]["file"] == "dense.safetensors":
            continue
        (part,) = entry["parts"]
        tensor, along = whole[part["name"]], axis if len(entry["shape"]) > axis else 0
        edges = [0, *[round(c * tensor.shape[along] / 4) * 4 if along else round(c * len(tensor)) for c in cuts]]
        edges.append(tensor.shape[along])
        entry["parts"] = []
        for rank, (first, last) in reversed(list(enumerate(zip(edges[:-1], edges[1:], strict=True)))):
            offsets = [0] * tensor.dim()
            offsets[along] = first
            name = f"{key}@{','.join(map(str, offsets))}"
            owned[rank % ranks][name] = tensor.narrow(along, first, last - first).contiguous()
            entry["parts"].append(
                {
                    "file": f"rank-{rank % ranks:05d}.safetensors",
                    "name": name,
                    "offsets": offsets,
                    "sizes": list(owned[rank % ranks][name].shape),
                }
            )
    save_file(load_file(folder / "dense.safetensors"), out / "dense.safetensors")
    for rank, tensors in enumerate(owned):
        save_file(tensors, out / f"rank-{rank:05d}.safetensors")
    manifest["files"] = {p.name: sha256(p) for p in sorted(out.iterdir())}
    write_manifest(out, manifest)
    return open_checkpoint(out)


CUTS = {
    "two row parts": (0, [0.4]),
    "three row parts": (0, [0.2, 0.7]),
    "two column parts": (1, [0.5]),
}


# -- round trip ------------------------------------------------------------------------------------------------------


def test_checkpoint_loads_into_a_fresh_model_bit_for_bit(trained):
    model, optimizer, folder, transform = trained
    fresh, fresh_optimizer = shard(RUN, transform, seed=1)
    saved, other = snapshot(model, optimizer), snapshot(fresh, fresh_optimizer)
    assert list(other) == list(saved)
    assert not torch.equal(other["tables/user/weight"], saved["tables/user/weight"])
    load_into(training_state(fresh, fresh_optimizer), open_checkpoint(folder))
    for key, value in snapshot(fresh, fresh_optimizer).items():
        assert torch.equal(value, saved[key]), key

    for seed in (7, 8):
        batch = batch_of(transform, seed)
        losses = [train_step(m, o, LOSS, batch, 1) for m, o in ((model, optimizer), (fresh, fresh_optimizer))]
        assert torch.equal(*losses)
    after = snapshot(model, optimizer)
    assert not torch.equal(after["tables/user/weight"], saved["tables/user/weight"])
    for key, value in snapshot(fresh, fresh_optimizer).items():
        assert torch.equal(value, after[key]), key


def test_checkpoint_holds_all_state_and_its_header(trained):
    model, optimizer, folder, transform = trained
    opened = open_checkpoint(folder)
    state = snapshot(model, optimizer)
    assert sorted(opened.keys()) == sorted(state)
    assert {k.split("/")[0] for k in state} == {"tables", "dense", "dense_optimizer"}
    for table in transform.tables:
        assert opened.shape(f"tables/{table}/momentum1") == (transform.tables[table].num_embeddings,)
        assert state[f"tables/{table}/momentum1"].abs().sum() > 0, "trained, so there is something to save"
    for key, value in state.items():
        assert torch.equal(opened.read(key), value), key
    assert opened.run == RUN
    assert opened.position == POSITION
    assert (opened.fingerprint, opened.metrics) == ("abc", {"ne": 0.9})
    model.module.head.load_state_dict(opened.dense_state(), strict=True)


def test_checkpoint_before_the_first_step_has_the_same_tensors(trained, tmp_path):
    _, _, folder, transform = trained
    model, optimizer = shard(RUN, transform, seed=1)
    save_checkpoint(tmp_path / "first", training_state(model, optimizer), HEADER, 0, 1)
    assert open_checkpoint(tmp_path / "first").keys() == open_checkpoint(folder).keys()


def test_checkpoint_version_names_the_weights(trained, tmp_path):
    model, optimizer, folder, transform = trained
    save_checkpoint(tmp_path / "same", training_state(model, optimizer), HEADER | {"fingerprint": "x"}, 0, 1)
    train_step(model, optimizer, LOSS, batch_of(transform, 5), 1)
    save_checkpoint(tmp_path / "later", training_state(model, optimizer), HEADER, 0, 1)
    versions = [open_checkpoint(p).version for p in (folder, tmp_path / "same", tmp_path / "later")]
    assert versions[0] == versions[1] != versions[2]


def test_position_that_never_evaluated_round_trips(trained, tmp_path):
    model, optimizer, _, _ = trained
    header = HEADER | {"position": asdict(Position())}
    save_checkpoint(tmp_path / "first", training_state(model, optimizer), header, 0, 1)
    assert open_checkpoint(tmp_path / "first").position == Position()


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", CUTS)
@pytest.mark.parametrize("read_rows", [3, 1 << 20])
def test_table_rows_equal_indexing_whatever_the_parts(trained, tmp_path, monkeypatch, parts, read_rows):
    model, optimizer, folder, transform = trained
    monkeypatch.setattr(checkpoint_module, "READ_ROWS", read_rows)
    opened = cut_tables(folder, tmp_path / "parts", *CUTS[parts])
    for table in transform.tables:
        weight = snapshot(model, optimizer)[f"tables/{table}/weight"]
        rng = np.random.default_rng(0)
        every = np.arange(len(weight))
        few = np.sort(rng.choice(len(weight), 4, replace=False))
        for rows in (every, few, every[:1], every[-1:]):
            assert torch.equal(opened.table_rows(table, rows), weight[torch.from_numpy(rows)]), (table, rows)
        assert opened.table_rows(table, every[:0]).shape == (0, weight.shape[1])
        chunks = list(opened.table_chunks(table))
        assert [first for first, _ in chunks] == list(range(0, len(weight), read_rows))
        assert torch.equal(torch.cat([c for _, c in chunks]), weight)


def assert_any_range_is_read(opened, state) -> None:
    for key in ("tables/item/weight", "tables/item/momentum1", "tables/user/weight"):
        whole = state[key]
        for first in range(len(whole)):
            for last in range(first + 1, len(whole) + 1):
                assert torch.equal(opened.read(key, first, last), whole[first:last]), (key, first, last)
        assert opened.read(key, 2, 2).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("parts", CUTS)
def test_any_range_is_read_whatever_the_parts(trained, tmp_path, parts):
    model, optimizer, folder, _ = trained
    assert_any_range_is_read(cut_tables(folder, tmp_path / "parts", *CUTS[parts]), snapshot(model, optimizer))


@pytest.mark.parametrize("cuts", [[0.5, 0.5], [0.0, 0.5]], ids=["between", "first"])
def test_any_range_is_read_where_a_rank_holds_no_rows(trained, tmp_path, cuts):
    model, optimizer, folder, _ = trained
    assert_any_range_is_read(cut_tables(folder, tmp_path / "parts", 0, cuts), snapshot(model, optimizer))


@pytest.mark.parametrize("parts", CUTS)
def test_checkpoint_of_several_ranks_loads_into_one(trained, tmp_path, parts):
    model, optimizer, folder, transform = trained
    fresh, fresh_optimizer = shard(RUN, transform, seed=1)
    load_into(training_state(fresh, fresh_optimizer), cut_tables(folder, tmp_path / "parts", *CUTS[parts]))
    expected = snapshot(model, optimizer)
    for key, value in snapshot(fresh, fresh_optimizer).items():
        assert torch.equal(value, expected[key]), key


def in_shards(weight: torch.Tensor, axis: int, cut: int) -> ShardedTensor:
    """A table in two shards, both on this rank."""
    shards = []
    for first, last in ((0, cut), (cut, weight.shape[axis])):
        offsets = [first if a == axis else 0 for a in range(2)]
        shards.append(Shard.from_tensor_and_offsets(weight.narrow(axis, first, last - first).clone(), offsets, rank=0))
    return init_from_local_shards(shards, *weight.shape)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("saved", [(0, 3), (1, 4)], ids=["saved by rows", "saved by columns"])
@pytest.mark.parametrize("live", [(0, 5), (1, 2)], ids=["live by rows", "live by columns"])
def test_shards_are_saved_and_loaded_where_they_lie(tmp_path, saved, live):
    weight = torch.randn(11, 8)
    save_checkpoint(tmp_path / "saved", {"tables/t/weight": in_shards(weight, *saved)}, HEADER, 0, 1)
    opened = open_checkpoint(tmp_path / "saved")
    assert torch.equal(opened.read("tables/t/weight"), weight)
    assert torch.equal(opened.table_rows("t", np.array([0, 2, 3, 10])), weight[[0, 2, 3, 10]])
    state = {"tables/t/weight": in_shards(torch.zeros(11, 8), *live)}
    load_into(state, opened)
    expected = in_shards(weight, *live)
    for got, want in zip(state["tables/t/weight"].local_shards(), expected.local_shards(), strict=True):
        assert torch.equal(got.tensor, want.tensor)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense.safetensors", "rank-00000.safetensors"])
@pytest.mark.parametrize("at", [20, -1])
def test_altered_byte_is_refused_naming_the_file(trained, name, at):
    folder = trained[2]
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: altered since it was written"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["dense.safetensors", "rank-00000.safetensors"])
def test_missing_file_is_refused_naming_it(trained, name):
    folder = trained[2]
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing from the checkpoint"):
        open_checkpoint(folder)
    unverified = open_checkpoint(folder, verify=False)
    key = "dense/head.out.bias" if name.startswith("dense") else "tables/user/weight"
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        unverified.read(key)


def test_truncated_file_is_refused_even_unverified(trained):
    folder = trained[2]
    content = (folder / "dense.safetensors").read_bytes()
    (folder / "dense.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"dense\.safetensors: cannot be read"):
        open_checkpoint(folder, verify=False).dense_state()


def test_folder_that_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="not a checkpoint: give the folder that 'train' wrote"):
            open_checkpoint(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 2}', "7"])
def test_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: not a checkpoint manifest"):
        open_checkpoint(tmp_path)


def test_manifest_of_binary_rubbish_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["files", "tensors"])
def test_manifest_without_its_parts_is_refused(trained, key):
    path = trained[2] / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(trained[2]).keys()


def test_checkpoint_of_another_format_is_refused(trained):
    path = trained[2] / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        open_checkpoint(trained[2])


def test_checkpoint_of_a_run_with_unknown_keys_is_refused_naming_the_manifest(trained):
    path = trained[2] / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["run"]["train"]["momentum"] = 0.9
    path.write_text(json.dumps(manifest))
    with pytest.raises(SlimrankError, match=rf"{MANIFEST}: train\.momentum: unknown key"):
        open_checkpoint(trained[2])


def test_checkpoint_of_another_shape_is_refused(trained):
    transform = fitted(random_log(80), make_run(min_count=12).data)
    model, optimizer = shard(RUN, transform, seed=0)
    with pytest.raises(CheckpointError, match=r"tables/\w+/weight is \(.*\), this model has \(.*\)"):
        load_into(training_state(model, optimizer), open_checkpoint(trained[2]))


def test_checkpoint_of_a_smaller_model_is_refused(trained):
    run = make_run(model={"cross_layers": 3})
    model, optimizer = shard(run, trained[3], seed=0)
    with pytest.raises(CheckpointError, match=r"lacks dense/head\.crosses\.2\.down\.weight and \d+ more"):
        load_into(training_state(model, optimizer), open_checkpoint(trained[2]))


def test_altered_header_is_refused(trained):
    """The files are as they were written; what the manifest says of them is not."""
    path = trained[2] / MANIFEST
    whole = json.loads(path.read_text())
    for key, value in (("metrics", {"ne": 0.1}), ("fingerprint", "abd"), ("world_size", 2)):
        path.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(CheckpointError, match=rf"{MANIFEST}: altered since it was written"):
            open_checkpoint(trained[2], verify=False)
    whole["tensors"]["tables/user/weight"]["parts"][0]["offsets"] = [1, 0]
    path.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="altered since it was written"):
        open_checkpoint(trained[2])


def test_manifest_without_its_digest_is_refused(trained):
    path = trained[2] / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="altered since it was written"):
        open_checkpoint(trained[2])


def test_manifest_laid_out_anew_is_the_same(trained):
    """Order of keys and white space are not what it says."""
    path = trained[2] / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(manifest.items())), indent=7))
    assert open_checkpoint(trained[2]).position == POSITION


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_bytes", [1, 7, 16 << 20])
def test_written_tensors_are_read_by_the_safetensors_library(tmp_path, monkeypatch, write_bytes):
    monkeypatch.setattr(checkpoint_module, "WRITE_BYTES", write_bytes)
    tensors = {
        "tables/t/weight@0,0": torch.randn(5, 3),
        "no rows": torch.zeros(0, 4),
        "a number": torch.tensor(7.5),
        "half": torch.randn(3).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(1, dtype=torch.float64),
        "whole": torch.tensor([2**62, -1]),
        "naïve ✓": torch.ones(1),
    }
    digest = write_tensors(tmp_path / "x.safetensors", tensors)
    assert digest == sha256(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def test_file_without_tensors_is_one_too(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


STATE = {"tables/t/weight": torch.arange(4000.0).view(1000, 4), "dense/w": torch.ones(3)}


def test_saving_leaves_no_partial_folder_and_replaces_one_that_was_left(tmp_path):
    partial = tmp_path / ".step-1.partial"
    partial.mkdir()
    (partial / "rank-00007.safetensors").write_bytes(b"of a run that was killed")
    save_checkpoint(tmp_path / "step-1", STATE, HEADER, 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert {p.name for p in (tmp_path / "step-1").iterdir()} == {MANIFEST, "dense.safetensors"}
    save_checkpoint(tmp_path / "step-1", STATE | {"dense/w": torch.zeros(3)}, HEADER, 0, 1)
    assert open_checkpoint(tmp_path / "step-1").read("dense/w").tolist() == [0, 0, 0]


@contextlib.contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """This process's files may grow no further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 9000, 20_000], ids=["at once", "within tensors", "within the manifest"])
@pytest.mark.parametrize("name", ["step-2", "step-1"])
def test_save_that_fails_half_way_leaves_the_ones_before_whole(tmp_path, limit, name):
    save_checkpoint(tmp_path / "step-1", STATE, HEADER, 0, 1)
    header = HEADER | {"plan": {"text": "x" * 40_000}}
    with pytest.raises(CheckpointError) as error, files_of_at_most(limit):
        save_checkpoint(tmp_path / name, STATE, header, 0, 1)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert "File too large: free space or choose another --out, then go on with --resume" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert torch.equal(open_checkpoint(tmp_path / "step-1").read("tables/t/weight"), STATE["tables/t/weight"])
    save_checkpoint(tmp_path / name, STATE, header, 0, 1)
    assert open_checkpoint(tmp_path / name).manifest["plan"] == header["plan"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step-1: rank 0 cannot write the checkpoint: .*free space or choose"):
        save_checkpoint(tmp_path / "run" / "step-1", STATE, HEADER, 0, 1)
    assert (tmp_path / "run").read_text() == "a file"


# -- growing ---------------------------------------------------------------------------------------------------------


def grown(tmp_path, stored: dict[str, torch.Tensor], live: dict[str, torch.Tensor], grow: bool = True) -> None:
    save_checkpoint(tmp_path / "saved", stored, HEADER, 0, 1)
    load_into(live, open_checkpoint(tmp_path / "saved"), grow=grow)


@pytest.mark.parametrize("read_rows", [2, 3, 1 << 20])
def test_new_rows_start_as_the_out_of_vocabulary_row(tmp_path, monkeypatch, read_rows):
    monkeypatch.setattr(checkpoint_module, "READ_ROWS", read_rows)
    weight, momentum = torch.randn(5, 4), torch.rand(5)
    live = {"tables/t/weight": torch.full((8, 4), 9.0), "tables/t/momentum1": torch.zeros(8)}
    grown(tmp_path, {"tables/t/weight": weight, "tables/t/momentum1": momentum}, live)
    assert torch.equal(live["tables/t/weight"], torch.cat([weight, weight[OOV_ROW].expand(3, 4)]))
    assert torch.equal(live["tables/t/momentum1"], torch.cat([momentum, torch.zeros(3)]))


def test_new_columns_keep_what_they_have(tmp_path):
    weight, momentum = torch.randn(5, 4), torch.rand(5, 4)
    start = torch.randn(5, 8)
    live = {"tables/t/weight": start.clone(), "tables/t/momentum1": torch.zeros(5, 8)}
    grown(tmp_path, {"tables/t/weight": weight, "tables/t/momentum1": momentum}, live)
    assert torch.equal(live["tables/t/weight"], torch.cat([weight, start[:, 4:]], dim=1))
    assert torch.equal(live["tables/t/momentum1"], torch.cat([momentum, torch.zeros(5, 4)], dim=1))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("live", [(0, 3), (0, 6), (1, 2), (1, 4), (1, 6)])
def test_tables_grow_in_both_ways_whatever_their_shards(tmp_path, live):
    weight, start = torch.randn(5, 4), torch.randn(7, 8)
    expected = start.clone()
    expected[:5, :4] = weight
    expected[5:, :4] = weight[OOV_ROW]
    state = {"tables/t/weight": in_shards(start, *live)}
    grown(tmp_path, {"tables/t/weight": weight}, state)
    for got, want in zip(
        state["tables/t/weight"].local_shards(), in_shards(expected, *live).local_shards(), strict=True
    ):
        assert torch.equal(got.tensor, want.tensor)


@pytest.mark.parametrize(
    ("key", "stored", "live", "grow"),
    [
        ("tables/t/weight", (5, 4), (6, 4), False),
        ("tables/t/weight", (5, 4), (4, 4), True),
        ("tables/t/weight", (5, 4), (6, 2), True),
        ("dense/w", (5, 4), (6, 4), True),
        ("tables/t/momentum1", (5,), (5, 4), True),
    ],
)
def test_other_shapes_are_refused(tmp_path, key, stored, live, grow):
    with pytest.raises(CheckpointError, match=rf"{key} is \({stored[0]},.*\), this model has \({live[0]},"):
        grown(tmp_path, {key: torch.zeros(stored)}, {key: torch.zeros(live)}, grow)


# -- finding ---------------------------------------------------------------------------------------------------------


def test_run_folder_resolves_to_its_best_checkpoint(trained, tmp_path):
    folder = trained[2]
    write_json(tmp_path / "train.json", {"best": "saved"})
    assert resolve(tmp_path) == folder
    assert resolve(folder) == folder
    write_json(tmp_path / "train.json", {"best": "gone"})
    with pytest.raises(CheckpointError, match="gone: the run's best checkpoint is gone"):
        resolve(tmp_path)
