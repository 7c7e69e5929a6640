"""What a request and an answer look like, and which requests are refused.

Bodies are validated here for shape; whether a value fits its feature shows when it is encoded (serve/features.py).

Legend: K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    Strict,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, from_json

from serve.errors import RequestError

LONGEST_MS = 600_000.0
FORMS = "item ids (text or whole numbers), a list of objects of columns, or an object of columns"
CANDIDATES_SCHEMA = {
    "description": "Item ids of the catalogue; or one object of raw columns for each candidate; or raw columns, each a "
    "list with a value for each candidate.",
    "anyOf": [
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        {"type": "array", "minItems": 1, "items": {"type": "object", "additionalProperties": True}},
        {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": "array", "minItems": 1, "items": {}},
        },
    ],
}


def check_candidates(value: Any) -> Any:
    """The candidates as given. Raises: PydanticCustomError unless they have one of the forms that can be ranked."""
    if isinstance(value, pa.Table):  # the columns of an Arrow body, checked where it was read
        return value
    if isinstance(value, dict):
        return _check_columns(value)
    if not isinstance(value, list):
        raise PydanticCustomError("candidates", f"must be a list of {FORMS}")
    if not value:
        raise PydanticCustomError("candidates", "must hold at least 1 item")
    kinds = set(map(type, value))
    if not (kinds <= {str, int} or kinds == {dict}):
        raise PydanticCustomError("candidates", f"must be a list of {FORMS}")
    return value


def _check_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns as given. Raises: PydanticCustomError naming the first that is no list, or not as long as the first."""
    if not columns:
        raise PydanticCustomError("candidates", f"must be a list of {FORMS}")
    first = next(iter(columns))
    for name, values in columns.items():
        if not isinstance(values, list) or not values:
            raise PydanticCustomError("candidates", "must be a list of a value for each candidate", {"column": name})
        if len(values) != len(columns[first]):
            problem = f"holds {len(values):,} values and {first[:80]} {len(columns[first]):,}: give one a candidate"
            raise PydanticCustomError("candidates", problem, {"column": name})
    return columns


class ScoreRequest(BaseModel):
    """One user, and what to score for them.

    `user` holds raw columns of the log (user-side and context features); absent ones count as missing. `candidates` are
    item ids of the artifact's catalogue, or raw columns: an object for each candidate, or a list for each column.
    `timeout_ms`: an answer that takes longer is given up with status 504.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    user: Annotated[dict[str, Any], Strict()]
    candidates: Annotated[Any, PlainValidator(check_candidates), WithJsonSchema(CANDIDATES_SCHEMA)]
    timeout_ms: Annotated[float, Strict()] | None = Field(default=None, gt=0, le=LONGEST_MS, allow_inf_nan=False)
    _request_id: str | None = PrivateAttr(default=None)

    @property
    def request_id(self) -> str | None:
        """The name of the request, where its caller or the server has given it one; not part of the body."""
        return self._request_id

    @request_id.setter
    def request_id(self, name: str) -> None:
        self._request_id = name

    @property
    def count(self) -> int:
        """How many candidates there are (K)."""
        return count_of(self.candidates)


class RankRequest(ScoreRequest):
    """One user, and what to rank for them.

    `user` holds raw columns of the log (user-side and context features); absent ones count as missing. `candidates` are
    item ids of the artifact's catalogue, or raw columns: an object for each candidate, or a list for each column.
    `k`: how many items the answer holds. `explain`: say for each what every feature contributed. `timeout_ms`: an
    answer that takes longer is given up with status 504.
    """

    k: StrictInt = Field(default=10, ge=1)
    explain: StrictBool = False


class RankedItem(BaseModel):
    """One item of an answer: its id as it was asked (or its place among the candidates), and its score.

    `scores`: probabilities by task, where there are several. `contributions`: by feature, where they were asked for.
    """

    id: str | int
    score: float
    title: str | None = None
    scores: dict[str, float] | None = None
    contributions: dict[str, float] | None = None


class RankResponse(BaseModel):
    """The top k by falling score, the artifact's version, and the milliseconds that ranking took.

    `ignored`: what of the request no feature reads.
    """

    request_id: str
    version: str
    items: list[RankedItem]
    ms: float
    ignored: list[str] | None = None


class ScoreResponse(BaseModel):
    """The scores of all candidates in the request's order; `tasks`: probabilities by task, where there are several."""

    request_id: str
    version: str
    scores: list[float]
    tasks: dict[str, list[float]] | None = None
    ms: float
    ignored: list[str] | None = None


class Problem(BaseModel):
    """Why there is no answer: the field that is at fault, and the rule it breaks."""

    error: str
    field: str
    request_id: str | None = None


Kind = type[RankRequest] | type[ScoreRequest]


def parse_body(body: bytes, max_candidates: int, kind: Kind = RankRequest) -> Any:
    """Decode and validate the bytes of a JSON body, as a request of `kind`.

    A key that is given twice counts as it was given last. Raises: RequestError, 400 when they are not JSON (NaN,
    Infinity and half a surrogate pair are not), else naming the field.
    """
    return check_request(decode(body, "body"), max_candidates, kind)


def decode(text: bytes, field: str) -> Any:
    """The value of JSON text. Raises: RequestError 400 naming `field` when it is none."""
    try:
        return from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestError(field, f"is not valid JSON: {error}", 400) from None


def check_request(body: Any, max_candidates: int, kind: Kind = RankRequest) -> Any:
    """Validate a decoded body. Raises: RequestError naming the field."""
    if not isinstance(body, dict):
        raise RequestError("body", f"must be a JSON object with {_listed(kind)}")
    candidates = body.get("candidates")
    count = count_of(candidates)
    if count > max_candidates:
        raise RequestError("candidates", f"{count:,} given, at most {max_candidates:,} are allowed", 413)
    try:
        return _VALIDATORS[kind](body)
    except ValidationError as error:
        raise _first_problem(error, kind) from None


_VALIDATORS = {kind: TypeAdapter(kind).validator.validate_python for kind in (RankRequest, ScoreRequest)}


def count_of(candidates: Any) -> int:
    """How many candidates a body's value holds, whatever its form; 0 when it has none."""
    if isinstance(candidates, pa.Table):
        return len(candidates)
    if isinstance(candidates, Mapping):
        return max((len(values) for values in candidates.values() if isinstance(values, list)), default=0)
    return len(candidates) if isinstance(candidates, list) else 0


def utf8(text: str, field: str) -> str:
    """The text itself. Raises: RequestError when it holds half of a surrogate pair, which JSON allows and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(field, "holds text that is not valid Unicode") from None
    return text


def _listed(kind: Kind) -> str:
    *names, last = kind.model_fields
    return f"{', '.join(names)} and {last}"


def _first_problem(error: ValidationError, kind: Kind) -> RequestError:
    problem = error.errors(include_url=False)[0]
    field = (str(problem["loc"][0])[:80] if problem["loc"] else "") or "body"
    if problem["type"] == "candidates" and "ctx" in problem:
        return RequestError(f"candidates.{problem['ctx']['column'][:80]}", problem["msg"])
    if problem["type"] == "missing":
        return RequestError(field, "is required")
    if problem["type"] == "extra_forbidden":
        name = "rank" if kind is RankRequest else "score"
        return RequestError(field, f"is not part of a {name} request: {_listed(kind)} are")
    return RequestError(field, problem["msg"][:1].lower() + problem["msg"][1:])
