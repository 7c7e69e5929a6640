"""trainer/config.py: a run's YAML becomes a frozen value, or one line that says what is wrong."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from trainer_builders import make_run, run_content, write_run

from trainer.config import Stage, TrainConfig, dump_run, load_run, parse_run
from trainer.errors import ConfigError


def test_run_loads_and_is_frozen(tmp_path):
    run = load_run(write_run(tmp_path, run_content()))
    assert (run.name, run.model.embedding_dim, run.train) == ("tiny", 8, TrainConfig())
    with pytest.raises(ValidationError, match="frozen"):
        run.name = "other"


def test_run_dump_round_trips():
    run = make_run(train={"epochs": 3})
    assert parse_run(json.loads(dump_run(run)), "again") == run


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("speed",), 1, "speed: unknown key"),
        (("data", "inputs"), "x", "data.inputs: unknown key"),
        (("model", "archs"), "dcn", "model.archs: unknown key"),
        (("model", "arch"), "wide", "model.arch: Input should be 'dcn', 'deepfm', 'dlrm' or 'mmoe' (got 'wide')"),
        (("model", "embedding_dim"), 10, "model.embedding_dim: Input should be a multiple of 4 (got 10)"),
        (("train", "epochs"), 0, "train.epochs: Input should be greater than or equal to 1 (got 0)"),
        (("name",), "a b", "(got 'a b')"),
        (("data", "tasks"), None, "data.tasks: Input should be a valid list (got None)"),
    ],
)
def test_run_with_a_broken_value_gives_one_line(tmp_path, path, value, says):
    content = run_content()
    content["train"] = {}
    section = content
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    file = write_run(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        load_run(file)
    message = str(error.value)
    assert says in message
    assert message.startswith(f"{file}: ")
    assert len(message.splitlines()) == 1


def test_run_without_data_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml: data: missing: add it$"):
        load_run(write_run(tmp_path, {"name": "tiny"}))


def test_run_names_every_broken_rule_at_once(tmp_path):
    content = run_content() | {"train": {"epochs": 0, "sped": 1}}
    with pytest.raises(ConfigError) as error:
        load_run(write_run(tmp_path, content))
    assert "train.epochs" in str(error.value)
    assert "train.sped" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_run_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_run(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: [", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping .* got list"),
        (b"", "expected a mapping .* got NoneType"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_run_file_that_is_no_mapping_gives_one_line(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        load_run(path)
    assert len(str(error.value).splitlines()) == 1


def test_run_path_that_is_a_folder_gives_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_dlrm_with_numbers_needs_a_bottom_mlp(tmp_path):
    content = run_content()
    content["model"] |= {"arch": "dlrm", "bottom_mlp": []}
    with pytest.raises(ConfigError, match="bottom MLP"):
        load_run(write_run(tmp_path, content))


def test_paths_are_taken_from_the_runs_own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    file = write_run(tmp_path / "here", run_content(input="log/*.parquet"))
    monkeypatch.chdir(tmp_path)
    assert load_run("here/run.yaml").data.input == str(tmp_path / "here" / "log" / "*.parquet")
    assert load_run(file).data.input == str(tmp_path / "here" / "log" / "*.parquet")


def test_paths_of_split_files_are_taken_from_the_runs_own_folder(tmp_path):
    content = run_content(split={"files": {"train": "a.parquet", "val": "/b.parquet", "test": "s3://c/d"}}, input=None)
    files = load_run(write_run(tmp_path, content)).data.split.files
    assert files == {"train": str(tmp_path / "a.parquet"), "val": "/b.parquet", "test": "s3://c/d"}


def test_input_override_is_taken_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    file = write_run(tmp_path / "here", run_content())
    monkeypatch.chdir(tmp_path)
    assert load_run(file, "other/*.csv").data.input == str(tmp_path / "other" / "*.csv")
    assert load_run(file, "s3://bucket/x").data.input == "s3://bucket/x"


def test_input_override_beside_split_files_is_refused(tmp_path):
    content = run_content(split={"files": {s: f"{s}.parquet" for s in ("train", "val", "test")}}, input=None)
    file = write_run(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        load_run(file, str(tmp_path / "all.parquet"))
    assert str(error.value) == f"{file}: data.split.files names the files of each split: leave out --input"


def test_input_override_goes_with_a_split_that_names_no_files(tmp_path):
    file = write_run(tmp_path, run_content(split={"by": "row", "files": None}))
    assert load_run(file, "s3://bucket/x").data.input == "s3://bucket/x"


@pytest.mark.parametrize("sizes", [[0], [-1], [8, 0]])
@pytest.mark.parametrize("key", ["top_mlp", "bottom_mlp"])
def test_layer_sizes_below_one_are_refused(key, sizes):
    with pytest.raises(ConfigError, match=key):
        make_run(model={key: sizes})


def test_batch_smaller_than_the_workers_is_refused():
    with pytest.raises(ConfigError, match="batch_size"):
        make_run(train={"batch_size": 1, "workers": 2})


@pytest.mark.parametrize(
    ("rows", "batch"), [(1, 256), (65_536, 256), (100_000, 512), (262_144, 1024), (10_000_000, 4096)]
)
def test_batch_rows_follow_the_log(rows, batch):
    assert TrainConfig().batch_rows(rows) == batch


def test_batch_rows_as_configured():
    assert TrainConfig(batch_size=24).batch_rows(10**6) == 24


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"workers": 0}, "train.workers"),
        ({"workers": {"min": 3, "max": 2}}, "min 3 is more than max 2"),
        ({"workers": {"min": 0, "max": 2}}, "min: Input should be greater than or equal to 1 (got 0)"),
        ({"workers": {"min": 1}}, "max: missing: add it"),
        pytest.param(
            {"workers": {"min": 1, "max": 8}, "batch_size": 4},
            "batch_size 4 is global: it must be 8 (workers) at least",
        ),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps: Input should be greater than or equal to 0"),
        ({"schedule": {"decay": "step"}}, "schedule.decay: Input should be 'none', 'linear' or 'cosine' (got 'step')"),
        ({"schedule": {"end": 1.5}}, "schedule.end: Input should be less than or equal to 1 (got 1.5)"),
        ({"schedule": {"warm_up": 5}}, "schedule.warm_up: unknown key"),
        ({"plateau": {"factor": 1}}, "plateau.factor: Input should be less than 1 (got 1)"),
        ({"plateau": {"factor": 0}}, "plateau.factor: Input should be greater than 0 (got 0)"),
        ({"plateau": {"patience": 0}}, "plateau.patience: Input should be greater than or equal to 1 (got 0)"),
        ({"distill": {"alpha": 0.5}}, "distill.teacher: missing: add it"),
        ({"distill": {"teacher": "t", "alpha": 0}}, "distill.alpha: Input should be greater than 0 (got 0)"),
        ({"distill": {"teacher": "t", "temperature": 0}}, "distill.temperature: Input should be greater than 0"),
        ({"stages": [{"epochs": 0}]}, "stages.0.epochs: Input should be greater than or equal to 1 (got 0)"),
        ({"stages": [{"data_fraction": 0}]}, "stages.0.data_fraction: Input should be greater than 0 (got 0)"),
        ({"stages": [{"embedding_dim": 6}, {}]}, "embedding_dim: Input should be a multiple of 4 (got 6)"),
        ({"stages": [{"batch_size": 1}], "workers": 2}, "batch_size 1 is global: it must be 2 (workers) at least"),
        (
            {"stages": [{"embedding_dim": 8}, {"embedding_dim": 4}, {}]},
            "embedding_dim may only grow from stage to stage, not [8, 4]",
        ),
        ({"stages": [{"embedding_dim": 8}]}, "the last stage trains the whole model: leave out its embedding_dim"),
        ({"clip_norm": 0}, "train.clip_norm: Input should be greater than 0 (got 0)"),
        ({"precision": "fp8"}, "train.precision: Input should be 'auto', 'highest', 'medium' or 'bf16' (got 'fp8')"),
        ({"table_optimizer": "adam"}, "train.table_optimizer: Input should be 'rowwise_adagrad', 'adagrad' or 'sgd'"),
    ],
)
def test_train_section_that_breaks_a_rule_is_refused(train, says):
    with pytest.raises(ConfigError) as error:
        make_run(train=train)
    assert says in str(error.value)
    assert str(error.value).startswith("tiny.yaml: train")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"experts": 0}, "model.experts: Input should be greater than or equal to 1 (got 0)"),
        ({"tower_mlp": [0]}, "model.tower_mlp"),
        ({"batch_norm": "maybe"}, "model.batch_norm: Input should be a valid boolean"),
    ],
)
def test_model_section_that_breaks_a_rule_is_refused(model, says):
    with pytest.raises(ConfigError) as error:
        make_run(model=model)
    assert says in str(error.value)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_task_weight_is_a_positive_number(weight):
    with pytest.raises(ConfigError, match=r"data\.tasks\.0\.weight: Input should be"):
        make_run(tasks=[{"name": "click", "column": "label", "weight": weight}])


def test_workers_are_a_number_or_a_range():
    fixed, elastic = TrainConfig(workers=3), TrainConfig(workers={"min": 2, "max": 5})
    assert (fixed.min_workers, fixed.max_workers) == (3, 3)
    assert (elastic.min_workers, elastic.max_workers) == (2, 5)


def test_run_without_stages_is_one_stage():
    assert TrainConfig(epochs=7, batch_size=64).all_stages == (Stage(epochs=7, batch_size=64),)
    stages = ({"epochs": 2, "batch_size": 32}, {"epochs": 1})
    staged = TrainConfig(batch_size=64, stages=stages)
    assert [staged.batch_rows(10**6, s) for s in (0, 1)] == [32, 64]
    assert staged.all_stages == (Stage(epochs=2, batch_size=32), Stage(epochs=1))


def test_tables_are_cut_to_a_stages_dim_where_they_are_wider():
    run = make_run(model={"embedding_dim": 16}, train={"stages": [{"embedding_dim": 8}, {}]})
    narrow, whole = run.table_dims(0), run.table_dims(1)
    assert (narrow["user"], narrow["item"]) == (8, 4)
    assert (whole["user"], whole["item"]) == (16, 4)
    assert whole == run.table_dims()
    assert "history" not in whole, "it reads the table of item"


def test_teacher_is_taken_from_the_runs_own_folder(tmp_path):
    content = run_content() | {"train": {"distill": {"teacher": "runs/large"}}}
    assert load_run(write_run(tmp_path, content)).train.distill.teacher == str(tmp_path / "runs" / "large")
    assert load_run(write_run(tmp_path, content | {"train": {"distill": {"teacher": "/x"}}})).train.distill.teacher == (
        "/x"
    )


def test_distill_that_is_no_mapping_gives_one_line(tmp_path):
    content = run_content() | {"train": {"distill": "runs/large"}}
    with pytest.raises(ConfigError, match=r"train\.distill") as error:
        load_run(write_run(tmp_path, content))
    assert len(str(error.value).splitlines()) == 1


def test_whole_run_of_new_keys_round_trips():
    train = {
        "workers": {"min": 1, "max": 2},
        "schedule": {"warmup_steps": 5, "decay": "cosine", "end": 0.1},
        "plateau": {},
        "distill": {"teacher": "/t", "temperature": 2, "alpha": 0.9},
        "stages": [{"embedding_dim": 4}, {"epochs": 2}],
    }
    run = make_run(train=train, model={"arch": "mmoe", "experts": 2, "tower_mlp": [], "batch_norm": True})
    assert parse_run(json.loads(dump_run(run)), "again") == run
