"""What a request and an answer look like, and which requests are refused.

Bodies are validated here for shape; whether a value fits its feature shows when it is encoded (serve/features.py).
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictInt, StrictStr, ValidationError

from serve.errors import RequestError

ItemId = StrictStr | StrictInt


class RankRequest(BaseModel):
    """One user, and what to rank for them.

    `user` holds raw columns of the log (user-side and context features); absent ones count as missing. `candidates` are
    item ids of the artifact's catalogue, or objects of raw columns.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"user": {"user_id": "196", "age": 49}, "candidates": ["242", "302"], "k": 2}},
    )

    user: Annotated[dict[str, Any], Strict()]
    candidates: list[ItemId] | list[dict[str, Any]] = Field(min_length=1)
    k: StrictInt = Field(default=10, ge=1)


class RankedItem(BaseModel):
    """One item of an answer: its id as it was asked (or its place among the candidates), and its score."""

    id: str | int
    score: float
    title: str | None = None
    scores: dict[str, float] | None = None


class RankResponse(BaseModel):
    """The top k by falling score, the artifact's version, and the milliseconds that ranking took."""

    request_id: str
    version: str
    items: list[RankedItem]
    ms: float
    ignored: list[str] | None = None


def parse_body(body: bytes, max_candidates: int) -> RankRequest:
    """Decode and validate the bytes of a JSON body.

    Raises: RequestError, 400 when they are not JSON, else naming the field.
    """
    try:
        decoded = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise RequestError("body", "is not valid JSON", 400) from None
    return parse_request(decoded, max_candidates)


def parse_request(body: Any, max_candidates: int) -> RankRequest:
    """Validate a decoded JSON body.

    Raises: RequestError naming the field.
    """
    if not isinstance(body, dict):
        raise RequestError("body", "must be a JSON object with user, candidates and k")
    candidates = body.get("candidates")
    if isinstance(candidates, list) and len(candidates) > max_candidates:
        raise RequestError("candidates", f"{len(candidates):,} given, at most {max_candidates:,} are allowed", 413)
    try:
        request = RankRequest.model_validate(body)
    except ValidationError as error:
        raise _first_problem(error, body) from None
    for key in request.user:  # the answer names those that no feature reads
        utf8(key, "user")
    for candidate in request.candidates:
        if isinstance(candidate, str):
            utf8(candidate, "candidates")
    return request


def refuse_constant(name: str) -> None:
    """Raises: ValueError for NaN and Infinity, which Python's parser takes and JSON does not know."""
    raise ValueError(f"{name} is not JSON")


def utf8(text: str, field: str) -> str:
    """The text itself. Raises: RequestError when it holds half of a surrogate pair, which JSON allows and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(field, "holds text that is not valid Unicode") from None
    return text


def _first_problem(error: ValidationError, body: dict[str, Any]) -> RequestError:
    problem = error.errors()[0]
    field = str(problem["loc"][0]) if problem["loc"] else "body"
    if field == "candidates" and body.get("candidates"):
        return RequestError(
            field, "must be a list of item ids (text or whole numbers), or a list of objects of columns"
        )
    if problem["type"] == "missing":
        return RequestError(field, "is required")
    if problem["type"] == "extra_forbidden":
        return RequestError(field, "is not part of a rank request: user, candidates and k are")
    return RequestError(field, problem["msg"][:1].lower() + problem["msg"][1:])
