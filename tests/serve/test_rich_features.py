"""serve/features.py with sequences and weighted bags: what a request says is what the log said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compress_builders import World
from rich_builders import rich_world_in

from compress.artifact import Artifact
from compress.config import CompressionPlan, TablePlan
from serve.errors import RequestError
from serve.features import FeatureReader
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse
from trainer.data.encoded import Encoded
from trainer.metrics import sigmoid

USER = ("user_id", "seen", "bought", "likes", "like_how", "age")
ITEM = ("item_id", "words", "word_how")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return rich_world_in(tmp_path_factory.getbasetemp(), "dcn")


@pytest.fixture(scope="module")
def artifact(world: World) -> Artifact:
    return world.artifact(CompressionPlan(default=TablePlan(bits=8)))


@pytest.fixture(scope="module")
def reader(artifact: Artifact) -> FeatureReader:
    return FeatureReader(artifact)


def same(a: Encoded, b: Encoded) -> bool:
    """Whether two encodings are equal to the last id and weight."""
    return (
        list(a.sparse) == list(b.sparse)
        and all(
            np.array_equal(getattr(a.sparse[n], part), getattr(b.sparse[n], part))
            for n in a.sparse
            for part in ("values", "lengths", "weights", "positions")
            if getattr(b.sparse[n], part) is not None or getattr(a.sparse[n], part) is not None
        )
        and np.array_equal(a.dense, b.dense)
    )


def part_of(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    return {c: row[c] for c in columns}


@pytest.mark.parametrize("shape", ["ids", "objects", "objects that hold all"])
def test_request_encodes_as_the_log_row(world: World, artifact: Artifact, reader: FeatureReader, shape: str) -> None:
    raw = world.dataset.sample().slice(0, 60)
    expected = artifact.model.transform.encode(raw)
    for at, row in enumerate(raw.to_pylist()):
        user, item = part_of(row, USER), part_of(row, ITEM)
        if shape == "ids":
            found, ignored = reader.read(user, [row["item_id"]])
        elif shape == "objects":
            found, ignored = reader.read(user, [item])
        else:
            found, ignored = reader.read({}, [{**user, **item}])
        assert same(found, expected.take(np.array([at]))), row
        assert ignored == []


def test_candidates_as_objects_encode_as_catalogue_ids(world: World, reader: FeatureReader) -> None:
    rows = {r["item_id"]: r for r in world.raw.to_pylist()}
    user = part_of(world.raw.slice(5, 1).to_pylist()[0], USER)
    ids = sorted(rows)
    by_id, _ = reader.read(user, ids)
    by_columns, _ = reader.read(user, [part_of(rows[i], ITEM) for i in ids])
    assert same(by_id, by_columns)
    assert len(by_id) == len(ids)


def test_lists_and_text_of_weights_are_one(reader: FeatureReader) -> None:
    user = {"likes": ["red", "blue"], "like_how": [2, 0.5]}
    text, _ = reader.read(user, [{"words": "red|blue", "word_how": "1|0.25"}])
    lists, _ = reader.read(user, [{"words": ["red", "blue"], "word_how": [1, 0.25]}])
    assert same(text, lists)
    assert text.sparse["words"].weights.tolist() == [1.0, 0.25]  # type: ignore[union-attr]
    assert text.sparse["likes"].weights.tolist() == pytest.approx([0.8, 0.2])  # type: ignore[union-attr]


def test_ids_without_weights_count_one(reader: FeatureReader) -> None:
    found, _ = reader.read({"likes": ["red", "blue"]}, [{"words": "red|blue"}])
    assert found.sparse["words"].weights.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert found.sparse["likes"].weights.tolist() == [0.5, 0.5]  # type: ignore[union-attr]


def test_unknown_item_beside_known_ones_keeps_their_weights(world: World, reader: FeatureReader) -> None:
    both, _ = reader.read({}, ["i3", "nobody", "i9"])
    known, _ = reader.read({}, ["i3", "i9"])
    assert same(both.take(np.array([0, 2])), known)
    assert both.sparse["words"].take(np.array([1])).weights.tolist() == [1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("user", "item", "says"),
    [
        ({"likes": ["red"], "like_how": [1, 2]}, {}, "1 ids in 'likes' and 2 weights in 'like_how'"),
        ({"likes": ["red"], "like_how": [-1]}, {}, "holds weight -1: weights are 0 or more"),
        ({"likes": ["red"], "like_how": ["many"]}, {}, "must be a number, not 'many'"),
        ({}, {"words": "red", "word_how": {"a": 1}}, "must be a number, not dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    reader: FeatureReader, user: dict[str, Any], item: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        reader.read(user, [{"item_id": "i3", **item}])


def test_ranker_scores_requests_as_the_model_scores_the_log(world: World, artifact: Artifact) -> None:
    """Together, so that histories and bags of many lengths lie side by side."""
    raw = world.dataset.sample().slice(0, 20)
    expected = sigmoid(artifact.model.score_encoded(artifact.model.transform.encode(raw))[:, 0])
    requests = [
        RankRequest(user=part_of(row, USER), candidates=[row["item_id"] if at % 2 else part_of(row, ITEM)], k=1)
        for at, row in enumerate(raw.to_pylist())
    ]
    for answer, want in zip(Ranker(artifact).answer_many(requests), expected, strict=True):
        assert isinstance(answer, RankResponse)
        assert answer.items[0].score == pytest.approx(want, abs=1e-5)
        assert answer.ignored is None
