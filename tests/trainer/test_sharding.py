"""trainer/sharding.py and memory.py: plans that train to one result, or one line that says why there is none."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.multiprocessing
from sharding_ranks import GLOBAL_ROWS, World, on_rank, train_under
from trainer_builders import CPU, fitted, make_run, random_log

from trainer import machine, sharding
from trainer.config import ShardingConfig, TableSharding, parse_run
from trainer.data.batch import to_batch
from trainer.data.transform import TableInfo
from trainer.errors import ConfigError
from trainer.machine import cgroup_limit, cores, cpu_quota, machine_memory_bytes
from trainer.memory import plan_memory, state_bytes
from trainer.models import build_ranker
from trainer.optimizer import fuse_table_optimizer
from trainer.sharders import filled_up, sharders
from trainer.sharding import (
    Need,
    allowed_types,
    check_sharding,
    column_width,
    describe_plan,
    leaves_empty_shards,
    make_plan,
    misfit,
    misfit_list,
)

shard_warnings = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)

MIXED = {
    "default": "table_wise",
    "tables": {
        "user": {"type": "column_wise", "min_partition": 4},
        "item": "column_wise",
        "hashed": "auto",
        "tags": "row_wise",
    },
}
CASES = {
    "table_wise": ({"default": "table_wise"}, "rowwise_adagrad"),
    "row_wise": ({"default": "row_wise"}, "rowwise_adagrad"),
    "pipelined row_wise": ({"default": "row_wise"}, "rowwise_adagrad"),
    "auto": ({"default": "auto"}, "rowwise_adagrad"),
    "data_parallel": ({"default": "data_parallel"}, "rowwise_adagrad"),
    "whole adagrad": ({"default": "table_wise"}, "adagrad"),
    "mixed adagrad": (MIXED, "adagrad"),
    "fp16": ({"default": "row_wise", "comms": "fp16", "tables": {"user": "table_wise"}}, "rowwise_adagrad"),
    "int8": ({"default": "table_wise", "comms": "int8", "tables": {"tags": "row_wise"}}, "rowwise_adagrad"),
    "too large": ({"default": "table_wise", "memory_share": 1e-9}, "rowwise_adagrad"),
    "another optimizer": ({"default": "column_wise"}, "rowwise_adagrad"),
}


@pytest.fixture(scope="module")
def world() -> World:
    """Four tables of 4 to 14 rows; the hash table's 4 rows are too few for three row-wise workers."""
    features = [
        {"name": "user", "kind": "categorical", "dim": 8},
        {"name": "item", "kind": "categorical", "dim": 12},
        {"name": "history", "kind": "multi", "table": "item"},
        {"name": "hashed", "kind": "categorical", "hash_size": 2, "dim": 4},
        {"name": "tags", "kind": "multi", "separator": "|", "pooling": "sum", "dim": 8},
        {"name": "price", "kind": "numeric"},
    ]
    run = make_run(features=features)
    return World(run, fitted(random_log(80), run.data), [random_log(GLOBAL_ROWS, seed=step) for step in range(3)])


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory) -> dict[int, list[dict]]:
    """For 2 and 3 workers: what each rank found under every case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["torchrec.distributed.model_parallel", "pandas", "pyarrow.parquet"])
    torch.multiprocessing.start_processes(on_rank, (str(folder), world, CASES), nprocs=3, start_method="forkserver")
    return {n: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(n)] for n in (2, 3)}


@pytest.fixture
def alone(world, group) -> dict:
    """What one worker with whole tables found, under each optimizer."""
    return {name: train_under(world, ShardingConfig(), name, 0, 1) for name in ("rowwise_adagrad", "adagrad")}


def whole_tables(found: list[dict], case: str) -> dict[str, torch.Tensor]:
    """Tables put together from the shards of all ranks; every value must come from some shard."""
    tables: dict[str, torch.Tensor] = {}
    for rank in found:
        for name, (row, column), tensor in rank[case]["shards"]:
            rows, columns = row + tensor.shape[0], column + tensor.shape[1]
            held = tables.get(name, torch.full((rows, columns), torch.nan))
            wider = torch.full((max(rows, held.shape[0]), max(columns, held.shape[1])), torch.nan)
            wider[: held.shape[0], : held.shape[1]] = held
            wider[row:rows, column:columns] = tensor
            tables[name] = wider
    return tables


@shard_warnings
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("case", "exact"),
    [
        ("table_wise", True),
        ("row_wise", True),
        ("data_parallel", True),
        ("auto", True),
        ("pipelined row_wise", True),
        ("fp16", False),
        ("int8", False),
    ],
)
def test_training_ends_in_the_same_tables_under_every_plan(ranks, alone, world_size, case, exact):
    expected = whole_tables([{"alone": alone["rowwise_adagrad"]}], "alone")
    tables = whole_tables(ranks[world_size], case)
    assert tables.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            tables[name], expected[name], rtol=0, atol=2e-5 if exact else 0.02, msg=lambda m, n=name: f"{n}: {m}"
        )
    same = all(torch.allclose(tables[name], expected[name], rtol=0, atol=1e-7) for name in expected)
    assert exact or not same, "comms in fewer bits leave a trace"


@shard_warnings
@pytest.mark.parametrize("world_size", [2, 3])
def test_columns_rows_and_whole_tables_mix_under_an_elementwise_optimizer(ranks, alone, world_size):
    expected = whole_tables([{"alone": alone["adagrad"]}], "alone")
    for case in ("whole adagrad", "mixed adagrad"):
        tables = whole_tables(ranks[world_size], case)
        for name in expected:
            torch.testing.assert_close(tables[name], expected[name], rtol=0, atol=2e-4)
    plan = ranks[world_size][0]["mixed adagrad"]["plan"]
    types = {name: how["sharding_type"] for name, how in plan.items()}
    assert (types["user"], types["item"], types["tags"]) == ("column_wise", "column_wise", "row_wise")
    assert [s["sizes"][1] for s in plan["user"]["shards"]] == [4, 4]
    assert [s["sizes"][1] for s in plan["item"]["shards"]] == [4, 4, 4]
    assert {s["rank"] for s in plan["item"]["shards"]} == set(range(world_size))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", ["table_wise", "row_wise", "auto", "data_parallel", "mixed adagrad"])
def test_each_rank_holds_what_the_plan_says(ranks, world_size, case):
    for rank, found in enumerate(ranks[world_size]):
        held = [(name, offsets, list(tensor.shape)) for name, offsets, tensor in found[case]["shards"]]
        planned = [
            (name, shard["offsets"], shard["sizes"])
            for name, how in found[case]["plan"].items()
            for shard in how["shards"]
            if shard["rank"] == rank
        ]
        parallel = [n for n, how in found[case]["plan"].items() if how["sharding_type"] == "data_parallel"]
        assert sorted(h for h in held if h[0] not in parallel) == sorted(planned)
        assert {h[0] for h in held if h[0] in parallel} == set(parallel)
        assert found[case]["plan"] == ranks[world_size][0][case]["plan"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", ["table_wise", "row_wise", "whole adagrad"])
def test_measured_table_bytes_are_the_estimate(ranks, world_size, case):
    for found in ranks[world_size]:
        estimate = found[case]["estimate"]
        assert found[case]["measured"]["table_bytes"] == estimate["weight_bytes"] + estimate["optimizer_bytes"]
        assert found[case]["measured"]["peak_rss_bytes"] > 100 << 20
        assert found[case]["measured"]["cuda_peak_bytes"] is None


def test_row_wise_shards_are_contiguous_blocks(ranks):
    shards = ranks[3][0]["row_wise"]["plan"]["user"]["shards"]
    rows = [s["sizes"][0] for s in shards]
    assert [s["rank"] for s in shards] == [0, 1, 2]
    assert [s["offsets"] for s in shards] == [[0, 0], [rows[0], 0], [rows[0] + rows[1], 0]]
    assert rows[0] == rows[1] >= rows[2] > 0


def test_table_with_fewer_rows_than_blocks_is_placed_whole_unless_named(ranks):
    assert ranks[2][0]["row_wise"]["plan"]["hashed"]["sharding_type"] == "row_wise"
    assert ranks[3][0]["row_wise"]["plan"]["hashed"]["sharding_type"] == "table_wise"


@pytest.mark.parametrize("world_size", [2, 3])
def test_data_parallel_tables_are_the_same_on_all_ranks(ranks, world_size):
    first = {name: tensor for name, _, tensor in ranks[world_size][0]["data_parallel"]["shards"]}
    for found in ranks[world_size][1:]:
        assert all(torch.equal(tensor, first[name]) for name, _, tensor in found["data_parallel"]["shards"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_is_told_why_there_is_no_plan(ranks, world_size):
    for found in ranks[world_size]:
        assert "tables do not fit" in found["too large"]["error"]
        assert "use table_optimizer adagrad" in found["another optimizer"]["error"]


# -- one worker ------------------------------------------------------------------------------------------------------


def plan_here(sharding_config: ShardingConfig, table_optimizer: str = "rowwise_adagrad"):
    run = make_run()
    transform = fitted(random_log(80), run.data)
    model = build_ranker(run.model, transform)
    fuse_table_optimizer(model.embeddings, run.train)
    return make_plan(
        model,
        transform,
        CPU,
        world_size=1,
        local_world_size=1,
        batch_size=8,
        sharding=sharding_config,
        table_optimizer=table_optimizer,
    )


@pytest.mark.usefixtures("group")
def test_plan_places_every_table_whole_by_default():
    plan = describe_plan(plan_here(ShardingConfig()))
    assert {(how["sharding_type"], how["compute_kernel"], tuple(how["ranks"])) for how in plan.values()} == {
        ("table_wise", "fused", (0,))
    }
    assert plan["hashed"]["shards"] == [{"rank": 0, "offsets": [0, 0], "sizes": [13, 8]}]


@pytest.mark.usefixtures("group")
def test_one_worker_takes_every_type():
    asked = {"user": "row_wise", "item": "data_parallel", "tags": "auto", "age": "column_wise"}
    plan = describe_plan(plan_here(ShardingConfig(tables=asked), "adagrad"))
    assert plan["user"]["sharding_type"] == "row_wise"
    assert plan["item"]["shards"] == []
    assert plan["age"]["shards"] == [{"rank": 0, "offsets": [0, 0], "sizes": [6, 8]}]


@pytest.mark.usefixtures("group")
def test_tables_that_do_not_fit_are_named_with_bytes_and_cap(monkeypatch):
    monkeypatch.setattr(sharding, "machine_memory_bytes", lambda: 1_000)
    with pytest.raises(ConfigError) as error:
        plan_here(ShardingConfig())
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.startswith("tables do not fit 1 worker(s) with 700 B of memory each: hashed ")
    assert "add workers" in text


# -- what the config asks --------------------------------------------------------------------------------------------

TABLES = {
    "user": TableInfo("user", "hash", 1000, 16, ("user",)),
    "small": TableInfo("small", "hash", 10, 4, ("small", "other")),
}


def checked(device: str = "cpu", world_size: int = 2, optimizer: str = "adagrad", **asked):
    return check_sharding(TABLES, ShardingConfig(**asked), device, world_size, optimizer)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tables": {"usr": "row_wise"}}, r"train\.sharding\.tables\.usr: no such table: the tables are small, user"),
        ({"tables": {"small": "column_wise"}}, r"table small: column_wise cannot cut embedding_dim 4.*multiple of 4"),
        (
            {"tables": {"user": {"type": "column_wise", "min_partition": 12}}},
            r"table user: .*embedding_dim 16.*12 \(min_partition\)",
        ),
        ({"tables": {"user": {"kernel": "fused_uvm"}}}, r"table user: kernel fused_uvm needs a GPU"),
        ({"tables": {"user": {"kernel": "dense"}}}, r"table user: kernel dense is that of data_parallel"),
        (
            {"tables": {"small": "row_wise"}, "world_size": 6},
            r"table small: row_wise leaves some of 6 workers none of .*10",
        ),
        ({"tables": {"user": "table_row_wise"}}, r"table user: table_row_wise is for GPU hosts"),
        (
            {"tables": {"user": "column_wise"}, "optimizer": "rowwise_adagrad"},
            r"table user: column_wise with table_optimizer rowwise_adagrad.*use table_optimizer adagrad, or type",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(asked, words):
    with pytest.raises(ConfigError, match=words) as error:
        checked(**asked)
    assert "\n" not in str(error.value)


def test_gpu_kernels_and_types_are_taken_on_gpus():
    asked = checked("cuda", tables={"user": {"type": "table_row_wise", "kernel": "fused_uvm_caching"}})
    assert asked["user"].kernel == "fused_uvm_caching"
    assert asked["small"].type == "table_wise"


@pytest.mark.parametrize(
    ("dim", "least", "workers", "width"),
    [
        (16, None, 1, 16),
        (16, None, 2, 8),
        (16, None, 3, 8),
        (16, None, 4, 4),
        (12, None, 2, 4),  # 12 has no half that is a multiple of 4
        (20, None, 3, 4),
        (4, None, 2, None),
        (16, 8, 1, 8),
        (16, 12, 2, None),
        (24, 5, 2, 8),
    ],
)
def test_column_width(dim, least, workers, width):
    assert column_width(dim, least, workers) == width


def test_auto_allows_what_does_not_change_the_result():
    auto = TableSharding(type="auto")
    assert allowed_types(auto, "rowwise_adagrad", "cpu", 100, 4) == ["table_wise", "row_wise"]
    assert allowed_types(auto, "rowwise_adagrad", "cpu", 4, 3) == ["table_wise"]
    assert allowed_types(auto, "adagrad", "cpu", 100, 4) == ["table_wise", "row_wise", "column_wise"]
    assert "table_row_wise" in allowed_types(auto, "rowwise_adagrad", "cuda", 100, 4)
    for optimizer in ("adagrad", "rowwise_adagrad"):
        assert "data_parallel" not in allowed_types(auto, optimizer, "cuda", 100, 4)


@pytest.mark.parametrize(
    ("rows", "workers", "empty"), [(4, 2, False), (4, 3, True), (5, 4, True), (10, 4, False), (9, 4, True)]
)
def test_row_wise_may_leave_a_worker_nothing(rows, workers, empty):
    blocks = -(-rows // workers)
    assert leaves_empty_shards(rows, workers) == empty == (rows - blocks * (workers - 1) <= 0)


def test_sharding_is_read_from_yaml_with_bare_words():
    content = make_run().model_dump(mode="json")
    content["train"]["sharding"] = {
        "default": "row_wise",
        "tables": {"user": "table_wise", "item": {"kernel": "fused_uvm_caching", "cache_load_factor": 0.2}},
    }
    run = parse_run(content, "run.yaml")
    asked = run.train.sharding
    assert asked.of("user").type == "table_wise"
    assert asked.of("item").type == asked.of("none").type == "row_wise"
    assert asked.of("item").cache_load_factor == 0.2
    assert parse_run(run.model_dump(mode="json"), "again") == run


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("rowwise", "sharding.tables.user.type"),
        ({"type": "row_wise", "min_partition": 8}, "use it with type: column_wise"),
        ({"type": "column_wise", "min_partition": 6}, "multiple of 4"),
        ({"cache_load_factor": 0.2}, "set that kernel too"),
        ({"type": "table_wise", "kernel": "dense"}, "type: data_parallel"),
        ({"type": "data_parallel", "kernel": "fused"}, "has kernel dense"),
        ({"type": "row_wise", "kernl": "fused"}, "unknown key"),
    ],
)
def test_table_options_that_do_not_go_together_are_refused(table, words):
    content = make_run().model_dump(mode="json")
    content["train"]["sharding"] = {"tables": {"user": table}}
    with pytest.raises(ConfigError, match=words):
        parse_run(content, "run.yaml")


def test_bf16_comms_are_refused_on_cpu_and_codecs_made_elsewhere():
    with pytest.raises(ConfigError, match="gloo carries no bf16"):
        sharders("bf16", "cpu")
    assert sharders()[0].qcomm_codecs_registry is None
    registry = sharders("int8", "cpu")[0].qcomm_codecs_registry
    kinds = {op: (c.forward.quantized_dtype, c.backward.quantized_dtype) for op, c in registry.items()}
    assert kinds == {
        "POOLED_EMBEDDINGS_ALL_TO_ALL": (torch.uint8, torch.float16),
        "POOLED_EMBEDDINGS_REDUCE_SCATTER": (torch.float16, torch.float16),
    }


def test_fp16_gradients_of_a_mean_do_not_vanish():
    codec = sharders("fp16", "cpu")[0].qcomm_codecs_registry["POOLED_EMBEDDINGS_ALL_TO_ALL"].backward
    gradient = torch.tensor([1e-8, -3e-6, 1e-2])
    torch.testing.assert_close(codec.decode(codec.encode(gradient)), gradient, rtol=1e-3, atol=0)
    assert gradient.half()[0] == 0, "fp16 alone would lose it"


def test_filled_up_batches_keep_their_bags(world):
    bags = to_batch(world.transform.encode(random_log(5)), None).sparse
    wider = filled_up(bags, 8)
    assert wider.stride() == 8
    for key in bags.keys():  # noqa: SIM118 - a KeyedJaggedTensor is no dict
        assert torch.equal(wider[key].values(), bags[key].values())
        assert wider[key].lengths().tolist() == [*bags[key].lengths().tolist(), 0, 0, 0]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_machine_memory_is_that_of_a_real_machine():
    assert 2**28 < machine_memory_bytes() < 2**50


def test_containers_limit_counts_where_it_is_less(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_MEMORY", (str(limit),))
    physical = machine_memory_bytes()
    for text, expected in (("max", physical), ("1000000", 1_000_000), (str(2**60), physical), ("0", physical)):
        limit.write_text(text + "\n")
        assert machine_memory_bytes() == expected
    assert cgroup_limit(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("150000 100000", 1.5), ("max 100000", None), ("-1 100000", None), ("", None), ("100000 0", None)],
)
def test_cpu_quota(text, expected, tmp_path, monkeypatch):
    assert cpu_quota(text) == expected
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(machine, "CGROUP_CPU", str(tmp_path / "cpu.max"))
    assert cores() == 0.5


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("sgd", 0), ("rowwise_adagrad", 40), ("adagrad", 320)],
)
def test_state_bytes(optimizer, expected):
    assert state_bytes(optimizer, 10, 8) == expected


def test_state_of_an_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match="table_optimizer lion: its state's size is unknown: use one of sgd"):
        state_bytes("lion", 1, 4)


def test_plan_memory_counts_shards_and_copies():
    described = {
        "user": {
            "sharding_type": "row_wise",
            "shards": [{"rank": 0, "sizes": [600, 16]}, {"rank": 1, "sizes": [400, 16]}],
        },
        "small": {"sharding_type": "data_parallel", "shards": []},
    }
    first, second = plan_memory(described, TABLES, "rowwise_adagrad", 2)
    copy = 10 * 4 * 4
    assert first["weight_bytes"] == 600 * 16 * 4 + copy
    assert first["optimizer_bytes"] == 600 * 4 + 10 * 4
    assert first["gradient_bytes"] == second["gradient_bytes"] == copy
    assert second["weight_bytes"] == 400 * 16 * 4 + copy


def test_misfits_are_named_largest_first_up_to_five():
    needs = [Need(f"t{i}", i * 1000, i * 1000) for i in range(1, 8)]
    assert misfit(needs, 28_000, 1) is None
    assert misfit_list(needs) == "t7 7.0 kB, t6 6.0 kB, t5 5.0 kB, t4 4.0 kB, t3 3.0 kB and 2 more"
    single = misfit(needs, 5_500, 9)
    assert single is not None
    assert single.startswith("t7 7.0 kB, t6 6.0 kB on one worker, 1.5 kB too much: use type row_wise")
    total = misfit(needs, 10_000, 2)
    assert total is not None
    assert total.startswith("8.0 kB is missing in sum; the largest are t7 7.0 kB")
