"""serve/request.py, serve/errors.py and serve/config.py: which bodies are refused, and what is named."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from serve.config import ServeConfig
from serve.errors import RequestError
from serve.request import RankRequest, check_request, parse_body
from trainer.errors import SlimrankError

GOOD: dict[str, Any] = {"user": {"user_id": 7}, "candidates": ["a", "b"], "k": 1}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("body", "field", "rule"),
    [
        *[(b, "body", "must be a JSON object") for b in ([], [GOOD], "x", 7, 1.5, None, True)],
        ({}, "user", "is required"),
        (without("user"), "user", "is required"),
        *[({**GOOD, "user": u}, "user", "valid dictionary") for u in (None, [], "u", 7, [["user_id", 7]])],
        (without("candidates"), "candidates", "is required"),
        ({**GOOD, "candidates": []}, "candidates", "at least 1 item"),
        *[({**GOOD, "candidates": c}, "candidates", "list") for c in (None, "abc", 7, {}, True)],
        ({**GOOD, "candidates": {"a": 1}}, "candidates.a", "must be a list"),
        ({**GOOD, "candidates": {"a": [1], "b": []}}, "candidates.b", "must be a list"),
        ({**GOOD, "candidates": {"a": [1], "b": [1, 2]}}, "candidates.b", "holds 2 values and a 1"),
        *[
            ({**GOOD, "candidates": c}, "candidates", "must be a list of item ids")
            for c in ([1.5], [1.0], [True], [None], [["a"]], ["a", 1.5], ["a", True], ["a", None])
        ],
        *[
            ({**GOOD, "candidates": c}, "candidates", "must be a list of item ids")
            for c in (["a", {}], [{}, "a"], [{}, 7], [{}, None], [{}, []])
        ],
        *[({**GOOD, "k": k}, "k", "integer") for k in ("5", 1.0, 2.5, True, None, [], {})],
        *[({**GOOD, "k": k}, "k", "greater than or equal to 1") for k in (0, -1)],
        ({**GOOD, "limit": 3}, "limit", "not part of a rank request"),
        ({**GOOD, "K": 3}, "K", "not part of a rank request"),
    ],
)
def test_request_that_is_bad_names_its_field(body: object, field: str, rule: str) -> None:
    with pytest.raises(RequestError, match=rule) as caught:
        check_request(body, 10)
    assert caught.value.field == field
    assert caught.value.status == 422
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize("part", [{"user": {"\ud800": 1}}, {"candidates": ["\ud800"]}, {"candidates": [7, "b\udfff"]}])
def test_half_a_surrogate_pair_is_not_json(part: dict) -> None:
    with pytest.raises(RequestError, match="not valid JSON") as caught:
        parse_body(json.dumps({**GOOD, **part}).encode(), 10)
    assert (caught.value.field, caught.value.status) == ("body", 400)


@pytest.mark.parametrize("candidates", [list("abcdef"), [{}] * 6, [1.5] * 6])
def test_request_with_too_many_candidates_is_413(candidates: list) -> None:
    with pytest.raises(RequestError, match="6 given, at most 5") as caught:
        check_request({**GOOD, "candidates": candidates}, 5)
    assert (caught.value.field, caught.value.status) == ("candidates", 413)


def test_request_with_as_many_candidates_as_allowed_is_fine() -> None:
    assert len(check_request({**GOOD, "candidates": list("abcde")}, 5).candidates) == 5


@pytest.mark.parametrize("candidates", [["a"], [7], ["a", 7, "7"], [-1], [""], [{}], [{"item_id": None}, {"x": [1]}]])
def test_request_keeps_candidates_as_given(candidates: list) -> None:
    request = check_request({**GOOD, "candidates": candidates}, 10)
    assert request.candidates == candidates
    assert [type(c) for c in request.candidates] == [type(c) for c in candidates]


def test_request_without_k_wants_ten() -> None:
    assert check_request(without("k"), 10) == RankRequest(user={"user_id": 7}, candidates=["a", "b"], k=10)


def test_request_keeps_the_user_as_given() -> None:
    user = {"user_id": "7", "age": None, "tags": ["a", 1], "nested": {"x": 1}}
    assert check_request({**GOOD, "user": user}, 10).user == user


@pytest.mark.parametrize("error", [RequestError("k", "too small"), RequestError("body", "too large", 413)])
def test_request_error_survives_pickling(error: RequestError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RequestError
    assert (copy.field, copy.message, copy.status, str(copy)) == (
        error.field,
        error.message,
        error.status,
        str(error),
    )
    assert isinstance(copy, SlimrankError)


def test_serve_config_listens_on_loopback_by_default() -> None:
    config = ServeConfig()
    assert config.host == "127.0.0.1"
    assert ServeConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"port": 0}, "port"),
        ({"port": 70_000}, "port"),
        ({"min_replicas": 0}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is below min_replicas 3"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_body_bytes": 10}, "max_body_bytes"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_serve_config_refuses_what_cannot_be_served(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ServeConfig(**options)
