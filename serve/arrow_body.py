"""Arrow IPC streams in place of JSON: a request's candidates as columns, and an answer's items as columns.

A request is a stream of record batches of candidate columns; all else of it is a JSON object in the schema's metadata
under `slimrank`. An answer is one batch, with what is not of its items in the same place. What comes from outside is
bounded before it is decoded: plain columns, no dictionaries, nothing compressed, nothing that grows on reading.

Legend: K candidates.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from compress.checks import flatbuffer_field
from serve.errors import RequestError
from serve.request import Kind, RankRequest, RankResponse, ScoreResponse, check_request, decode

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
KEY = b"slimrank"
MOST_BATCHES = 64
MOST_COLUMNS = 1000
COMPRESSION = 3  # RecordBatch.compression of Arrow's format/Message.fbs
HEADER = 2  # Message.header

UNREADABLE = (pa.ArrowException, struct.error, OSError, ValueError, LookupError, OverflowError)


def parse_arrow(body: bytes, max_candidates: int, kind: Kind = RankRequest) -> Any:
    """Decode and validate an Arrow body, as a request of `kind`; its candidates stay where they lie in `body`.

    Raises: RequestError, 400 when it is no Arrow stream or not a plain one, else naming the field.
    """
    try:
        table = _read(body, max_candidates)
    except RequestError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RequestError("body", f"is not a readable Arrow IPC stream: {reason}", 400) from None
    rest = (table.schema.metadata or {}).get(KEY)
    if rest is None:
        raise RequestError("slimrank", "is missing from the schema's metadata: a JSON object with user and k")
    fields = decode(rest, "slimrank")
    if not isinstance(fields, dict):
        raise RequestError("slimrank", "must be a JSON object with user and k")
    if "candidates" in fields:
        raise RequestError("candidates", "are the columns of the stream: leave them out of its metadata")
    if not len(table):
        raise RequestError("candidates", "must hold at least 1 item")
    return check_request({**fields, "candidates": table}, max_candidates, kind)


def _read(body: bytes, max_candidates: int) -> pa.Table:
    """The columns of a stream. Raises: RequestError, or what Arrow raises over bytes that it cannot make sense of."""
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    schema = pa.ipc.read_schema(_message(reader, "schema"))
    check_columns(schema)
    batches: list[pa.RecordBatch] = []
    rows = 0
    for message in iter(lambda: _next(reader), None):
        if message.type != "record batch" or len(batches) == MOST_BATCHES:
            raise RequestError("body", f"must hold one schema and at most {MOST_BATCHES} record batches", 400)
        check_plain(message)
        batch = pa.ipc.read_record_batch(message, schema)
        rows += batch.num_rows
        if rows > max_candidates:
            raise RequestError("candidates", f"{rows:,} given, at most {max_candidates:,} are allowed", 413)
        batch.validate(full=True)  # before anything else is asked of it: what is damaged may end the process
        if batch.nbytes > len(body):
            raise RequestError("body", f"holds columns of {batch.nbytes:,} bytes in {len(body):,}", 400)
        batches.append(batch)
    return pa.Table.from_batches(batches, schema)


def _message(reader: Any, kind: str) -> pa.ipc.Message:
    message = _next(reader)
    if message is None or message.type != kind:
        raise RequestError("body", f"is not an Arrow IPC stream: it does not begin with a {kind}", 400)
    return message


def _next(reader: Any) -> pa.ipc.Message | None:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


def check_columns(schema: pa.Schema) -> None:
    """Raises: RequestError naming the first column that is not of a plain type, or is named twice."""
    if not 1 <= len(schema) <= MOST_COLUMNS:
        raise RequestError("candidates", f"holds {len(schema):,} columns: give 1 to {MOST_COLUMNS:,}")
    seen: set[str] = set()
    for column in schema:
        name = column.name[:80]
        kind = column.type
        plain = is_value(kind) or pa.types.is_null(kind) or (is_list(kind) and is_value(kind.value_type))
        if not plain:
            kinds = "whole numbers, floats, booleans, text, or lists of these"
            raise RequestError(f"candidates.{name}", f"is of type {str(kind)[:80]}: give {kinds}")
        if column.name in seen:
            raise RequestError(f"candidates.{name}", "is given twice")
        seen.add(column.name)


def is_value(kind: pa.DataType) -> bool:
    """Types of one value that a feature may be read from."""
    plain = (pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string())
    return kind in plain or pa.types.is_integer(kind)


def is_list(kind: pa.DataType) -> bool:
    """Types of several values a candidate."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def check_plain(message: pa.ipc.Message) -> None:
    """Raises: RequestError when a batch is compressed, which could grow without bound; struct.error when damaged."""
    content = message.metadata.to_pybytes()
    (root,) = struct.unpack_from("<I", content, 0)
    header = flatbuffer_field(content, root, HEADER)
    if header is None:
        raise ValueError("a message without a header")
    (target,) = struct.unpack_from("<I", content, header)
    if flatbuffer_field(content, header + target, COMPRESSION) is not None:
        raise RequestError("body", "holds a compressed batch: send it uncompressed", 400)


def encode_arrow(answer: RankResponse | ScoreResponse) -> bytes:
    """An answer as an Arrow stream: id, score, title, scores.TASK and contributions.FEATURE of the items (or the score
    and scores.TASK of all candidates), and the rest as JSON in the metadata.
    """
    columns = _of_items(answer) if isinstance(answer, RankResponse) else _of_scores(answer)
    rest = answer.model_dump_json(exclude={"items", "scores", "tasks"}, exclude_none=True)
    table = pa.table(columns).replace_schema_metadata({KEY: rest})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _of_scores(answer: ScoreResponse) -> dict[str, pa.Array]:
    tasks = {f"scores.{task}": pa.array(values, pa.float64()) for task, values in (answer.tasks or {}).items()}
    return {"score": pa.array(answer.scores, pa.float64()), **tasks}


def _of_items(answer: RankResponse) -> dict[str, pa.Array]:
    items = answer.items
    ids = [item.id for item in items]
    whole = all(type(i) is int and -(2**63) <= i < 2**63 for i in ids)
    columns = {
        "id": pa.array(ids, pa.int64()) if whole else pa.array([str(i) for i in ids], pa.string()),
        "score": pa.array([item.score for item in items], pa.float64()),
        "title": pa.array([item.title for item in items], pa.string()),
    }
    for part in ("scores", "contributions"):
        for name in getattr(items[0], part) or ():
            columns[f"{part}.{name}"] = pa.array([getattr(item, part)[name] for item in items], pa.float64())
    return columns
