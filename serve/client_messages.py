"""What the Python client sends and reads, and when it asks again: pure functions, no connection. No torch, no Ray.

A body is JSON, or Arrow where the candidates are a pyarrow Table; an answer comes in the format of its question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from serve.errors import RequestError
from trainer.errors import SlimrankError

if TYPE_CHECKING:
    import pyarrow as pa

JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
METADATA_KEY = b"slimrank"
PASSING = {502, 503, 504}  # what a proxy or a replica that goes away answers: another one may do better
OVERLOADED = 429
PAUSE_S = 0.02  # before asking again, where the server names no time: about what a proxy needs to see a replica gone

Candidates: TypeAlias = "Sequence[str | int] | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | pa.Table"


class RefusedError(RequestError):
    """The server refused: `field` and `status` say what and how, `request_id` finds it in the server's log."""

    def __init__(
        self, field: str, message: str, status: int, retry_after_s: float | None = None, request_id: str = ""
    ) -> None:
        super().__init__(field, message, status, retry_after_s)
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.field}: {self.message} (status {self.status}, request {self.request_id or 'without id'})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.message, self.status, self.retry_after_s, self.request_id)


class UnreachableError(SlimrankError):
    """No answer: nothing listens, the connection broke, or the time was over."""


class AnswerError(SlimrankError):
    """An answer of status 200 that is not one of a ranker."""


@dataclass(frozen=True)
class Message:
    """A request's body and headers."""

    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What came back; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class RankedItem:
    """One item of a ranking. `scores`: by task, where there are several; `contributions`: by feature, if explained."""

    id: str | int
    score: float
    title: str | None = None
    scores: dict[str, float] | None = None
    contributions: dict[str, float] | None = None


@dataclass(frozen=True)
class Ranking:
    """The top k by falling score. `ms`: what ranking took; `ignored`: the user's keys that nothing read."""

    version: str
    request_id: str
    ms: float
    items: list[RankedItem]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The score of each candidate, in their order. `tasks`: by task, where there are several."""

    version: str
    request_id: str
    ms: float
    scores: list[float]
    tasks: dict[str, list[float]] | None = None


# -- what is sent ------------------------------------------------------------------------------------------------------


def encode(user: Mapping[str, Any], candidates: Candidates, options: Mapping[str, Any]) -> Message:
    """A request's message. `options`: fields beside user and candidates, such as k.

    Raises: RequestError when a value cannot be written as JSON, as NaN or a date.
    """
    if hasattr(candidates, "schema") and hasattr(candidates, "to_batches"):
        return _encode_arrow(user, candidates, options)
    body = _json({"user": dict(user), "candidates": candidates, **options})
    return Message(body, {"content-type": JSON_TYPE, "accept": JSON_TYPE})


def _encode_arrow(user: Mapping[str, Any], table: Any, options: Mapping[str, Any]) -> Message:
    import pyarrow as pa

    metadata = {**(table.schema.metadata or {}), METADATA_KEY: _json({"user": dict(user), **options})}
    schema = table.schema.with_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.combine_chunks().cast(schema))  # a server bounds how many batches it takes
    return Message(sink.getvalue().to_pybytes(), {"content-type": ARROW_TYPE, "accept": ARROW_TYPE})


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise RequestError("body", f"{error}: give text, finite numbers, lists of these, or None") from None


def _plain(value: Any) -> Any:
    """A numpy array or number as JSON knows it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} is not JSON")


# -- whether to ask again ----------------------------------------------------------------------------------------------


def wait_s(reply: Reply | Exception, left_s: float) -> float | None:
    """Seconds until it is worth asking again; None where it is not, or where that is later than `left_s`.

    Ranking changes nothing, so a request whose connection broke may be sent a second time.
    """
    if isinstance(reply, Exception):
        wait = 0.0  # an idle connection that the server had closed, or a replica that has gone
    elif reply.status == OVERLOADED or reply.status in PASSING:
        named = retry_after_s(reply)
        wait = PAUSE_S if named is None else named
    else:
        return None
    return wait if wait < left_s else None


def retry_after_s(reply: Reply) -> float | None:
    """Seconds of a reply's Retry-After; None where there are none (a date is not understood)."""
    value = reply.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


# -- what is read ------------------------------------------------------------------------------------------------------


def ranking(reply: Reply) -> Ranking:
    """A ranking. Raises: RefusedError, AnswerError."""
    content = _content(reply)
    try:
        rows = _rows(content["table"]) if "table" in content else content["items"]
        items = [RankedItem(**{k: row[k] for k in RankedItem.__dataclass_fields__ if k in row}) for row in rows]
        return Ranking(*_origin(content), items, tuple(content.get("ignored") or ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _strange(reply, error) from None


def scores(reply: Reply) -> Scores:
    """The scores of all candidates. Raises: RefusedError, AnswerError."""
    content = _content(reply)
    try:
        if "table" not in content:
            return Scores(*_origin(content), [float(s) for s in content["scores"]], content.get("tasks"))
        lists = content["table"].to_pydict()
        tasks = {name.removeprefix("scores."): values for name, values in lists.items() if name.startswith("scores.")}
        return Scores(*_origin(content), lists["score"], tasks or None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _strange(reply, error) from None


def _content(reply: Reply) -> dict[str, Any]:
    """The fields of an answer, the table of an Arrow one under "table". Raises: RefusedError, AnswerError."""
    if reply.status != 200:
        raise refused(reply)
    try:
        if not reply.headers.get("content-type", "").startswith(ARROW_TYPE):
            content = json.loads(reply.body)
        else:
            import pyarrow as pa

            table = pa.ipc.open_stream(reply.body).read_all()
            content = {**json.loads((table.schema.metadata or {})[METADATA_KEY]), "table": table}
    except (KeyError, ValueError, OSError) as error:  # pyarrow's errors are among them
        raise _strange(reply, error) from None
    if not isinstance(content, dict):
        raise _strange(reply, TypeError(f"a {type(content).__name__}"))
    return content


def _rows(table: Any) -> list[dict[str, Any]]:
    """The items of an Arrow answer, whose columns "scores.TASK" and "contributions.FEATURE" become one mapping each."""
    rows = table.to_pylist()
    for row in rows:
        for name in [name for name in row if "." in name]:
            part, _, key = name.partition(".")
            row.setdefault(part, {})[key] = row.pop(name)
    return rows


def _origin(content: Mapping[str, Any]) -> tuple[str, str, float]:
    return content["version"], content["request_id"], float(content["ms"])


def refused(reply: Reply) -> RefusedError:
    """What a reply of another status than 200 says. One that is not the ranker's own, as a proxy's, is of "server"."""
    field, message = "server", f"answered {reply.status}"
    try:
        content = json.loads(reply.body)
        field, message = str(content["field"]), str(content["error"])
    except (ValueError, KeyError, TypeError):
        pass
    request_id = reply.headers.get("x-request-id", "")
    return RefusedError(field, message, reply.status, retry_after_s(reply), request_id)


def _strange(reply: Reply, error: Exception) -> AnswerError:
    why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    start = reply.body[:60]
    return AnswerError(f"the server's answer is not one of a ranker ({why}): {start!r}: check the URL")
