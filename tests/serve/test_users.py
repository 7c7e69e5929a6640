"""Users' features: written from a log, found by id, filled in where a request gives none."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress_builders import World, quiet

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.ranker import Ranker
from serve.request import RankRequest
from serve.shelf import load
from serve.users import Users, open_users
from trainer.data.schema import DataConfig
from trainer.data.transform import read_arrow, write_arrow
from trainer.data.users import write_users
from trainer.errors import DataError, SlimrankError

FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "side": "user"},
    {"name": "years", "column": "age", "kind": "numeric", "side": "user"},
    {"name": "likes", "kind": "multi", "side": "user", "separator": "|", "weights": "much", "max_length": 2},
    {"name": "last", "kind": "sequence", "side": "user", "max_length": 2},
    {"name": "item", "kind": "categorical", "side": "item"},
]
LOG: dict[str, list[Any]] = {
    "user": [7, 7, 8, None, 7, 9],
    "age": [30.0, 31.0, None, 50.0, None, 20.0],
    "likes": ["a|b|c", None, "x", "q", "", "z"],
    "much": ["1|2|3", None, "5", "1", None, "4"],
    "last": [["a"], ["a", "b", "c"], None, ["q"], [], ["z"]],
    "item": ["i", "j", "i", "j", "i", "j"],
    "when": [5, 3, 1, 9, 9, 2],
    "click": [1, 0, 1, 0, 1, 0],
}


def schema_of(log: Path, **changes: Any) -> DataConfig:
    content = {
        "input": str(log),
        "timestamp": "when",
        "ids": {"user": "user", "item": "item"},
        "tasks": [{"column": "click"}],
        "features": FEATURES,
    }
    return DataConfig.model_validate(content | changes)


def write_small(folder: Path, **changes: Any) -> tuple[DataConfig, Path]:
    """Two files of the log, so two fragments, and the users of both."""
    log = pa.table(LOG)
    for number in range(2):
        pq.write_table(log.slice(3 * number, 3), folder / f"log-{number}.parquet")
    schema = schema_of(folder / "log-*.parquet", **changes)
    write_users(schema, folder / "users.arrow", quiet)
    return schema, folder / "users.arrow"


@pytest.fixture
def small(tmp_path: Path) -> Users:
    schema, path = write_small(tmp_path)
    return open_users(path, schema)


def row(users: Users, user: Any) -> dict[str, Any]:
    at = users.find(user)
    assert at is not None
    return users.row(at)


def test_users_hold_the_latest_known_value_of_each_feature(small: Users) -> None:
    assert sorted(small.ids.to_pylist()) == ["7", "8", "9"]
    # age 31 is older than 30; the empty list of time 9 is known to be empty, the null ones of time 3 are not known
    assert row(small, 7) == {"age": 30.0, "likes": ["a", "b"], "much": [1.0, 2.0], "last": []}
    assert row(small, 8) == {"likes": ["x"], "much": [5.0]}


def test_users_without_time_take_the_order_of_the_log(tmp_path: Path) -> None:
    schema, path = write_small(tmp_path, timestamp=None)
    assert row(open_users(path, schema), "7")["age"] == 31.0


@pytest.mark.parametrize("asked", [7, 7.0, "7"])
def test_users_are_found_by_any_form_of_their_id(small: Users, asked: Any) -> None:
    assert row(small, asked)["age"] == 30.0


@pytest.mark.parametrize("asked", [None, "", "nobody", 10, True, float("nan"), "7 "])
def test_unknown_users_get_nothing(small: Users, asked: Any) -> None:
    assert small.find(asked) is None
    assert small.fill({"user": asked, "age": 3}) == {"user": asked, "age": 3}


def test_what_a_request_gives_wins(small: Users) -> None:
    assert small.fill({"user": 7, "age": None})["age"] is None
    by_name = small.fill({"user": 7, "years": 1})  # the feature's own name for the column age
    assert by_name["years"] == 1
    assert "age" not in by_name
    assert small.fill({"user": 7})["age"] == 30.0
    assert small.fill({"age": 5}) == {"age": 5}


def test_ids_and_their_weights_come_from_one_place(small: Users) -> None:
    filled = small.fill({"user": 7, "likes": ["c"]})
    assert "much" not in filled
    assert filled["last"] == []


@pytest.mark.parametrize("asked", [[7], {"id": 7}])
def test_user_id_that_is_no_id_is_refused(small: Users, asked: Any) -> None:
    with pytest.raises(RequestError, match="must be one id") as caught:
        small.fill({"user": asked})
    assert caught.value.field == "user.user"


def test_id_that_no_feature_reads_is_not_passed_on(tmp_path: Path) -> None:
    schema, path = write_small(tmp_path, features=FEATURES[1:])
    assert open_users(path, schema).fill({"user": 9}) == {"age": 20.0, "likes": ["z"], "much": [4.0], "last": ["z"]}


def test_users_of_a_csv_log_are_those_of_its_parquet(tmp_path: Path) -> None:
    flat = {k: v for k, v in LOG.items() if k != "last"}
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(flat)
        writer.writerows([["" if v is None else v for v in line] for line in zip(*flat.values(), strict=True)])
    features = [f for f in FEATURES if f["name"] != "last"]
    schema = schema_of(tmp_path / "log.csv", features=features)
    write_users(schema, tmp_path / "users.arrow", quiet)
    users = open_users(tmp_path / "users.arrow", schema)
    assert row(users, 7) == {"age": 30.0, "likes": ["a", "b"], "much": [1.0, 2.0]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "users.arrow"]


def test_rows_that_break_a_rule_say_nothing_of_users(tmp_path: Path) -> None:
    schema, path = write_small(tmp_path, clean={"ranges": {"age": [None, 30]}})
    users = open_users(path, schema)
    assert row(users, 7)["last"] == []
    schema, path = write_small(tmp_path, clean={"required": ["age"]})
    assert open_users(path, schema).find(8) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": {"item": "item"}}, "names no user"),
        ({"features": [FEATURES[0], FEATURES[4]]}, "no feature but the id"),
    ],
)
def test_log_without_users_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        write_small(tmp_path, **changes)
    assert not (tmp_path / "users.arrow").exists()


def spoilt(column: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(column), column, values)


BROKEN: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "numbers as text": (spoilt("value.age", pa.array(["1", "2", "3"])), "value.age.*is string"),
    "ids as numbers": (spoilt("value.likes", pa.array([[1], [2], [3]])), "value.likes"),
    "unsorted": (lambda t: t.take(pa.array([2, 1, 0])), "not sorted"),
    "twice the same": (lambda t: t.take(pa.array([0, 0, 1])), "not sorted"),
    "keys of null": (spoilt("key", pa.array([None, 1, 2], pa.uint64())), "not sorted"),
    "keys of text": (spoilt("key", pa.array(["a", "b", "c"])), "not a file of users"),
    "no key": (lambda t: t.drop_columns(["key"]), "not a file of users"),
    "too many weights": (spoilt("value.much", pa.array([[1.0] * 3] * 3)), "one number"),
    "negative weights": (
        lambda t: spoilt("value.much", pa.array([[-1.0] * len(v) for v in t["value.likes"].to_pylist()]))(t),
        "one number",
    ),
    "weights alone": (lambda t: t.drop_columns(["value.likes"]), "without"),
    "nothing that is read": (lambda t: t.select(["key", "id"]), "holds no column"),
    "dictionaries": (lambda t: t.append_column("more", pa.array(["a"] * 3).dictionary_encode()), "dictionaries"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_not_of_users_is_refused_before_it_serves(tmp_path: Path, name: str) -> None:
    schema, path = write_small(tmp_path)
    spoil, words = BROKEN[name]
    changed = spoil(read_arrow(path))
    write_arrow(changed, tmp_path / "changed.arrow")
    with pytest.raises(SlimrankError, match=words):
        open_users(tmp_path / "changed.arrow", schema)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"not Arrow at all" * 10])
def test_bytes_that_are_no_arrow_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "users.arrow").write_bytes(content)
    with pytest.raises(SlimrankError, match="users.arrow"):
        open_users(tmp_path / "users.arrow", schema_of(tmp_path))


def test_absent_file_is_named_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(SlimrankError, match="slimrank data users"):
        open_users(tmp_path / "users.arrow", schema_of(tmp_path))


def test_ranking_by_id_alone_is_ranking_with_the_features_of_the_log(
    world: World, artifact: Artifact, ranker: Ranker, tmp_path: Path
) -> None:
    write_users(world.run.data, tmp_path / "users.arrow", quiet)
    knowing = load(str(artifact.folder), users=tmp_path / "users.arrow").ranker
    assert knowing.reader.users is not None
    log = world.raw.sort_by("when").to_pylist()
    latest: dict[Any, dict[str, Any]] = {}
    for line in log:
        seen = {c: line[c] for c in ("recent", "town", "age") if line[c] is not None}
        latest[line["user_id"]] = latest.get(line["user_id"], {}) | seen
    candidates = [f"i{i}" for i in range(40)]
    for user in list(latest)[:20]:
        alone = RankRequest(user={"user_id": user}, candidates=candidates, k=40)
        given = RankRequest(user={"user_id": user, **latest[user]}, candidates=candidates, k=40)
        found, expected = knowing.rank(alone).items, ranker.rank(given).items
        assert [i.id for i in found] == [i.id for i in expected]
        assert np.array_equal([i.score for i in found], [i.score for i in expected])
    assert knowing.rank(alone).ignored is None


def test_candidates_as_columns_read_the_users_features_too(
    world: World, artifact: Artifact, ranker: Ranker, tmp_path: Path
) -> None:
    write_users(world.run.data, tmp_path / "users.arrow", quiet)
    knowing = load(str(artifact.folder), users=tmp_path / "users.arrow").ranker
    user = world.raw["user_id"][0].as_py()
    assert knowing.reader.users is not None
    known = knowing.reader.users.fill({"user_id": user})
    rows = [{"item_id": "i1"}, {"item_id": "i2", "age": 70}]
    found = knowing.rank(RankRequest(user={"user_id": user}, candidates=rows))
    assert [i.score for i in found.items] == [
        i.score for i in ranker.rank(RankRequest(user=known, candidates=rows)).items
    ]
