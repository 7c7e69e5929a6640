"""cluster/topology.py and `slimrank plan`: machines by name, tables by size, a plan without either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from cluster.cli import main
from cluster.topology import (
    DEVICES,
    dry_run,
    find_tables,
    parse_rows,
    parse_topology,
    plan_lines,
    ranges,
    tables_of_config,
)
from trainer.config import RunConfig, parse_run
from trainer.errors import ConfigError

GB = 1000**3


def content(sharding: dict | None = None, **train: object) -> dict:
    features = [
        {"name": "user", "kind": "categorical", "hash_size": 200_000_000, "dim": 64},
        {"name": "item", "kind": "categorical", "hash_size": 50_000_000, "dim": 128},
        {"name": "history", "kind": "multi", "table": "item"},
        {"name": "city", "kind": "categorical", "hash_size": 98, "dim": 16},
        {"name": "age", "kind": "numeric", "transform": "bucketize", "buckets": 10, "dim": 16},
        {"name": "price", "kind": "numeric"},
    ]
    data = {"input": "log.parquet", "tasks": [{"name": "click", "column": "label"}], "features": features}
    return {"name": "big", "data": data, "train": {"batch_size": 65_536, "sharding": sharding or {}, **train}}


def run_of(sharding: dict | None = None) -> RunConfig:
    return parse_run(content(sharding), "run.yaml")


def planned(topology: str, sharding: dict | None = None, **rows: int) -> dict:
    run = run_of(sharding)
    known = find_tables(run, None, rows)
    assert known is not None
    return dry_run(run, known, parse_topology(topology))


@pytest.mark.parametrize(
    ("text", "world", "worker_bytes", "kind"),
    [
        ("2x8xH100-80GB", 16, 80 * GB, "cuda"),
        ("1x2xCPU-24GB", 2, 12 * GB, "cpu"),
        ("1X1xt4-16gib".replace("X", "x"), 1, 16 * 1024**3, "cuda"),
        ("3x1xCPU-1.5TB", 3, 1500 * GB, "cpu"),
    ],
)
def test_topology_is_read(text: str, world: int, worker_bytes: int, kind: str) -> None:
    cluster = parse_topology(text)
    assert (cluster.world_size, cluster.worker_bytes, cluster.compute_device) == (world, worker_bytes, kind)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xH100-80GB", "not of the form"),
        ("2x8xH100", "memory of a device is missing"),
        ("2x8xH100-80XB", "unit XB is unknown"),
        ("2x8xX100-80GB", "device X100 is unknown: use one of B200, H200, H100"),
        ("0x8xH100-80GB", "must be positive"),
        ("", "not of the form"),
    ],
)
def test_bad_topology_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_topology(text)


def test_every_known_device_cites_its_figures() -> None:
    assert all("datasheet" in d.source or "TorchRec" in d.source for d in DEVICES.values())
    assert all(d.memory > d.inter > 0 for d in DEVICES.values())
    assert all(d.intra >= d.inter for d in DEVICES.values())
    assert parse_topology("1x1xA100-80GB").device.memory > parse_topology("1x1xA100-40GB").device.memory


def test_sizes_come_from_the_config_or_must_be_counted() -> None:
    known = tables_of_config(run_of(), {"user": 7})
    assert known is not None
    assert {n: t.num_embeddings for n, t in known.tables.items()} == {
        "user": 7,
        "item": 50_000_002,
        "city": 100,
        "age": 12,
    }
    assert known.tables["item"].features == ("item", "history")
    raw = content()
    del raw["data"]["features"][0]["hash_size"]
    counted = parse_run(raw, "run.yaml")
    assert tables_of_config(counted, {}) is None
    told = tables_of_config(counted, {"user": 9})
    assert told is not None
    assert (told.tables["user"].kind, told.tables["user"].num_embeddings) == ("vocabulary", 9)


@pytest.mark.parametrize("word", ["user", "user=", "=3", "user=x", "user=0"])
def test_bad_rows_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="not of the form TABLE=N"):
        parse_rows([word])
    assert parse_rows(["a=b=3", "c=1_000"]) == {"a=b": 3, "c": 1000}


def test_whole_tables_go_to_devices_of_their_own() -> None:
    result = planned("1x4xH100-80GB")
    tables, devices = result["tables"], result["devices"]
    assert {how["sharding_type"] for how in tables.values()} == {"table_wise"}
    (user,), (item,) = tables["user"]["ranks"], tables["item"]["ranks"]
    assert user != item
    assert devices[user]["weight_bytes"] >= 200_000_002 * 64 * 4
    assert devices[user]["optimizer_bytes"] >= 200_000_002 * 4
    assert sum(d["weight_bytes"] for d in devices) == sum(
        how["num_embeddings"] * how["embedding_dim"] * 4 for how in tables.values()
    )
    assert result["step_ms"] == max(d["step_ms"] for d in devices) > 0
    assert all(d["total_bytes"] <= result["cap_bytes"] == 56 * GB for d in devices)
    assert sum(d["activation_bytes"] for d in devices) > 65_536 * 4 * 8  # at the least, the ids themselves


def test_tables_that_do_not_fit_are_named_with_what_is_missing() -> None:
    with pytest.raises(ConfigError) as error:
        planned("1x4xA100-40GB")
    text = str(error.value)
    assert "28.0 GB of GPU memory" in text
    assert "user 52.0 GB" in text
    assert "24.0 GB too much: use type row_wise" in text
    assert "city" not in text
    with pytest.raises(ConfigError, match=r"user 26\.\d+ GB on one worker, .* too much: add workers"):
        planned("1x2xL4-24GB", {"default": "row_wise"})


def test_copies_are_refused_with_the_gradient_that_the_planner_leaves_out() -> None:
    rows = {"user": 120_000_000, "item": 1000}  # 30.7 GB
    whole = planned("1x2xH100-80GB", **rows)
    assert whole["tables"]["user"]["sharding_type"] == "table_wise"
    with pytest.raises(ConfigError, match=r"data_parallel tables take .* twice .*: user 61\.4 GB: use type row_wise"):
        planned("1x2xH100-80GB", {"tables": {"user": "data_parallel"}}, **rows)
    result = planned("1x2xH100-80GB", {"tables": {"city": "data_parallel"}}, **rows)
    assert result["tables"]["city"]["ranks"] == [0, 1]
    assert result["tables"]["city"]["shards"] == []


def test_rows_are_spread_over_all_devices() -> None:
    result = planned("2x8xA100-40GB", {"default": "row_wise"})
    assert result["tables"]["user"]["ranks"] == list(range(16))
    assert result["tables"]["age"]["sharding_type"] == "table_wise", "12 rows are too few for 16 devices"
    weights = [d["weight_bytes"] for d in result["devices"]]
    assert max(weights) - min(weights) < 1e6


def test_gpu_host_types_and_kernels_are_planned() -> None:
    result = planned("2x8xH100-80GB", {"tables": {"user": "table_row_wise"}})
    assert result["tables"]["user"]["ranks"] in (list(range(8)), list(range(8, 16)))
    cached = {"type": "table_wise", "kernel": "fused_uvm_caching", "cache_load_factor": 0.1}
    result = planned("1x2xA100-40GB", {"tables": {"user": cached}})
    assert result["tables"]["user"]["compute_kernel"] == "fused_uvm_caching"
    device = result["devices"][result["tables"]["user"]["ranks"][0]]
    assert device["host_bytes"] == 200_000_002 * (64 + 1) * 4
    assert device["activation_bytes"] > 0.1 * 200_000_002 * 64 * 4, "its cache lies on the device"
    assert any("hosts' memory" in line for line in plan_lines(result))


def test_cpu_hosts_share_their_memory_and_refuse_gpu_kernels() -> None:
    rows = {"user": 1_000_000, "item": 100_000}
    result = planned("2x2xCPU-24GB", {"default": "auto"}, **rows)
    assert result["cap_bytes"] == round(12 * GB * 0.7)
    with pytest.raises(ConfigError, match="table user: kernel fused_uvm needs a GPU"):
        planned("1x2xCPU-24GB", {"tables": {"user": {"kernel": "fused_uvm"}}}, **rows)


def test_slower_networks_take_longer_steps() -> None:
    rows = {"user": 1_000_000, "item": 100_000}
    fast, slow = planned("2x4xH100-80GB", **rows), planned("2x4xL4-24GB", **rows)
    assert slow["step_ms"] > 2 * fast["step_ms"]


def test_ranges_of_ranks() -> None:
    assert [ranges(r) for r in ([], [3], [2, 0, 1], [0, 1, 4, 6, 7])] == ["", "3", "0-2", "0-1, 4, 6-7"]


# -- the command -----------------------------------------------------------------------------------------------------


def command(tmp_path: Path, *arguments: str, **changes: object) -> Result:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content(**changes)))  # type: ignore[arg-type]
    return CliRunner().invoke(main, ["plan", "--config", str(tmp_path / "run.yaml"), *arguments])


def test_plan_prints_tables_that_fit_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    done = command(tmp_path, "--topology", "1x8xH100-80GB")
    assert done.exit_code == 0, done.output
    table = done.stdout.split("embedding part of a step")[0].splitlines()
    assert all(len(line) <= 60 for line in table)
    for name in ("user", "item", "city", "age"):
        assert any(line.startswith(name) for line in table)
    assert "left out: the dense layers" in done.stdout
    assert "HBM3 3.35 TB/s" in done.stdout


def test_plan_json_is_what_out_holds(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = command(
        tmp_path, "--topology", "1x2xL4-24GB", "--rows", "user=1000", "--rows", "item=5", "--json", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["tables"]["item"]["shards"][0]["sizes"] == [5, 128]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "1x2xL4-24GB"], "tables do not fit 2 worker(s)"),
        (["--topology", "1x2xnone-24GB"], "device none is unknown"),
        (["--topology", "1x8xH100-80GB", "--rows", "usr=3"], "no such table: the tables are age, city, item, user"),
    ],
)
def test_plan_refuses_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = command(tmp_path, *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert done.stdout == ""
