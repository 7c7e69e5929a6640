"""Requests that nobody means well with: no 5xx, no crash, memory bounded, and the next request is answered as ever."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from bare_server import bare_server, stream_of  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from compress.artifact import Artifact  # noqa: E402
from serve.arrow_body import MEDIA_TYPE, parse_arrow  # noqa: E402
from serve.errors import RequestError  # noqa: E402
from serve.ranker import Ranker  # noqa: E402
from serve.request import RankRequest, parse_body  # noqa: E402

LIMIT = 1000
MUTANTS = 1500
GOOD = {"user": {"user_id": 7, "recent": ["i1"]}, "candidates": ["i1", "i2", "nobody"], "k": 2}


@pytest.fixture(scope="module")
def ranker(artifact: Artifact) -> Ranker:
    return Ranker(artifact)


@pytest.fixture(scope="module")
def server(ranker: Ranker) -> Iterator[str]:
    with bare_server(ranker, max_candidates=LIMIT) as url:
        yield url


# -- what the OpenAPI description allows, and what it forbids ---------------------------------------------------------


def no_defect(_context: Any, response: Any, _case: Any) -> None:
    """504 is what a deadline of a millisecond asks for."""
    assert response.status_code < 500 or response.status_code == 504, response.text


CHECKS = [
    no_defect,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_no_request_of_the_description_fails(server: str, mode: GenerationMode) -> None:
    """Every route, with requests that the description allows, and with such as it forbids."""
    fuzzed = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    described = schemathesis.openapi.from_url(f"{server}/openapi.json")
    paths = []
    for found in described.get_all_operations():
        operation = found.ok()
        paths.append(operation.path)

        @fuzzed
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        if mode is GenerationMode.POSITIVE or operation.body:  # a route without any input allows everything
            check()
    assert {"/v1/rank", "/v1/score", "/healthz", "/readyz"} <= set(paths)


# -- JSON ------------------------------------------------------------------------------------------------------------

DEEP = 100_000
ODD_BODIES: list[bytes] = [
    b"",
    b"\0",
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"[" * DEEP,
    b'{"user":' * DEEP,
    b'{"user": {}, "candidates": [' + b"[" * DEEP,
    b'{"user": {"a": ' + b"[" * 150 + b"]" * 150 + b'}, "candidates": ["i1"]}',
    b'{"user": {"age": ' + b"9" * 5000 + b'}, "candidates": ["i1"]}',
    b'{"user": {"age": ' + b"9" * 4000 + b'}, "candidates": ["i1"]}',
    b'{"user": {"age": 1e999, "income": -1e999}, "candidates": ["i1"]}',
    b'{"user": {"age": NaN}, "candidates": ["i1"]}',
    b'{"user": {"age": Infinity}, "candidates": ["i1"]}',
    b'{"user": {}, "candidates": ["i1"], "k": 1e2}',
    b'{"user": {}, "candidates": ["i1"], "k": ' + b"9" * 4000 + b"}",
    b'{"user": {}, "candidates": [' + b"9" * 4000 + b"]}",
    b'{"user": {}, "candidates": ["\\ud800"]}',
    b'{"user": {"\\udfff": 1}, "candidates": ["i1"]}',
    b'{"user": {"\\u0000": "\\u0000"}, "candidates": ["\\u0000", "i1"]}',
    b'{"user": {}, "user": {"age": 3}, "candidates": ["i1"]}',
    b'{"user": {}, "candidates": ["i1"], "timeout_ms": 1e-300}',
    b'{"user": {}, "candidates": {"' + b"x" * 100_000 + b'": 1}}',
    b'{"user": {}, "candidates": ["i1"], "' + b"x" * 100_000 + b'": 1}',
    b'{"user": {}, "candidates": {"": [1], "\\u0000": [2]}}',
    b'{"user": {}, "candidates": {"price": [{"a": 1}], "{column}": [1, 2]}}',
    b'{"user": {}, "candidates": [{}]}',
    json.dumps({"user": {}, "candidates": [{f"c{n}": n} for n in range(LIMIT)]}).encode(),
    json.dumps({"user": {"recent": "|" * 1_000_000}, "candidates": [{"town": "a"}] * LIMIT}).encode(),
    json.dumps({"user": {}, "candidates": {"genres": ["|" * 3000] * LIMIT}}).encode(),
    json.dumps({**GOOD, "__proto__": {}, "request_id": "x"}).encode(),
]


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
@pytest.mark.parametrize("path", ["/v1/rank", "/v1/score"])
def test_odd_json_is_answered_or_refused(server: str, path: str, body: bytes) -> None:
    answer = httpx.post(f"{server}{path}", content=body, timeout=30)
    assert answer.status_code in (200, 400, 413, 422, 504), answer.text[:300]
    answer.json()
    if answer.status_code != 200:
        assert answer.json()["field"]
        assert len(answer.content) < 2000


def test_damaged_json_is_answered_or_refused(ranker: Ranker) -> None:
    """Bytes flipped, cut out and doubled; what parses is ranked."""
    rng = random.Random(6)
    columns = {"item_id": ["i1", "i2"], "price": [1.5, None], "genres": ["War|Noir", ["a", 1]]}
    for seed in (GOOD, {**GOOD, "candidates": columns}, {**GOOD, "candidates": [{"item_id": "i1", "price": 2}]}):
        text = json.dumps({**seed, "explain": True, "timeout_ms": 5}).encode()
        outcomes = {tried(parse_body, mutate(text, rng), ranker) for _ in range(MUTANTS)}
        assert {200, 400, 422} <= outcomes <= {200, 400, 413, 422}


# -- Arrow -----------------------------------------------------------------------------------------------------------


def table_of(columns: dict[str, Any], **rest: Any) -> pa.Table:
    return pa.table(columns).replace_schema_metadata({"slimrank": json.dumps({"user": {}, **rest})})


def mutate(body: bytes, rng: random.Random) -> bytes:
    """One to three wounds."""
    out = bytearray(body)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randint(1, 16)]
        elif kind == 3:  # a length, an offset or a count
            out[at : at + 4] = struct.pack("<i", rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), 2**20, 255]))
        else:
            out[at : at + 8] = struct.pack("<q", rng.choice([-1, 2**62, 2**40, -(2**63), 1]))
        if not out:
            return body[:1]
    return bytes(out)


def tried(parse: Callable[[bytes, int], RankRequest], body: bytes, ranker: Ranker) -> int:
    """The status that a body gets; whatever is no refusal escapes."""
    try:
        request = parse(body, LIMIT)
        ranker.rank(request)
    except RequestError as error:
        return error.status if error.field else -1
    return 200


def arrow_seeds() -> list[bytes]:
    lists = {"item_id": ["i1", "i2", "i3"], "genres": [["War"], None, ["Noir", "a"]], "town": ["a", None, "b"]}
    numbers = {"item_id": [1, 2, 3], "price": [1.5, None, 3.0], "age": pa.array([1, 2, 3], pa.int8())}
    ids = {"item_id": ["i1", "i2"]}
    return [stream_of(table_of(columns, k=2)) for columns in (lists, numbers, ids)]


@pytest.mark.parametrize("seed", range(3))
def test_damaged_arrow_is_answered_or_refused(ranker: Ranker, seed: int) -> None:
    body = arrow_seeds()[seed]
    rng = random.Random(seed)
    before = peak_bytes()
    outcomes = {tried(parse_arrow, mutate(body, rng), ranker) for _ in range(MUTANTS)}
    assert outcomes >= {200, 400}
    assert outcomes <= {200, 400, 413, 422}
    assert peak_bytes() - before < 300 << 20


@pytest.mark.parametrize("seed", range(3))
def test_arrow_cut_short_anywhere_is_answered_or_refused(ranker: Ranker, seed: int) -> None:
    body = arrow_seeds()[seed]
    outcomes = {tried(parse_arrow, body[:end], ranker) for end in range(0, len(body), 3)}
    assert outcomes <= {200, 400, 422}
    assert {400, 422} & outcomes


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compressed(columns: dict[str, Any], codec: str) -> bytes:
    return stream_of(table_of(columns), pa.ipc.IpcWriteOptions(compression=codec))


def struct_column() -> pa.Array:
    return pa.array([{"a": 1}])


HOSTILE_ARROW: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "no bytes": (lambda: b"", 400, "body"),
    "JSON": (lambda: json.dumps(GOOD).encode(), 400, "body"),
    "a length of 2 GiB": (lambda: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\0" * 64, 400, "body"),
    "a negative length": (lambda: b"\xff\xff\xff\xff\xff\xff\xff\xff" + b"\0" * 64, 400, "body"),
    "nothing but an end": (lambda: b"\xff\xff\xff\xff\0\0\0\0", 400, "body"),
    "a file in place of a stream": (lambda: file_of(table_of({"item_id": ["i1"]})), 400, "body"),
    "no batch": (lambda: stream_of(table_of({"item_id": ["i1"]}).slice(0, 0)), 422, "candidates"),
    "no column": (lambda: stream_of(pa.table({}).replace_schema_metadata({"slimrank": "{}"})), 422, "candidates"),
    "no metadata": (lambda: stream_of(pa.table({"item_id": ["i1"]})), 422, "slimrank"),
    "metadata of no JSON": (lambda: with_metadata(b"{"), 400, "slimrank"),
    "metadata of a list": (lambda: with_metadata(b"[]"), 422, "slimrank"),
    "metadata nested": (lambda: with_metadata(b"[" * 100_000), 400, "slimrank"),
    "metadata without a user": (lambda: with_metadata(b"{}"), 422, "user"),
    "metadata with candidates": (lambda: with_metadata(b'{"user": {}, "candidates": [1]}'), 422, "candidates"),
    "metadata with more": (lambda: with_metadata(b'{"user": {}, "x": 1}'), 422, "x"),
    "a dictionary": (
        lambda: stream_of(table_of({"item_id": pa.array(["i1"]).dictionary_encode()})),
        422,
        "candidates.item_id",
    ),
    "a struct": (lambda: stream_of(table_of({"price": struct_column()})), 422, "candidates.price"),
    "lists of lists": (lambda: stream_of(table_of({"genres": [[["a"]]]})), 422, "candidates.genres"),
    "lists of nothing": (lambda: stream_of(table_of({"genres": [[None]]})), 422, "candidates.genres"),
    "views": (lambda: stream_of(table_of({"item_id": pa.array(["a"], pa.string_view())})), 422, "candidates.item_id"),
    "bytes": (lambda: stream_of(table_of({"item_id": [b"\xff"]})), 422, "candidates.item_id"),
    "times": (lambda: stream_of(table_of({"age": pa.array([1], pa.timestamp("us"))})), 422, "candidates.age"),
    "run ends": (lambda: stream_of(table_of({"age": run_ends()})), 422, "candidates.age"),
    "text for a number": (lambda: stream_of(table_of({"price": ["cheap"]})), 422, "candidates.price"),
    "a list for a number": (lambda: stream_of(table_of({"price": [[1.0]]})), 422, "candidates.price"),
    "text that is no UTF-8": (lambda: stream_of(table_of({"item_id": no_text()})), 400, "body"),
    "a column twice": (lambda: stream_of(twice()), 422, "candidates.price"),
    "too many": (lambda: stream_of(table_of({"price": np.zeros(LIMIT + 1)})), 413, "candidates"),
    "a billion rows of nothing": (lambda: stream_of(table_of({"price": pa.nulls(1 << 30)})), 413, "candidates"),
    "too many batches": (lambda: batches(65), 400, "body"),
    "too many columns": (lambda: stream_of(table_of({f"c{n}": [1] for n in range(1001)})), 422, "candidates"),
    "LZ4": (lambda: compressed({"price": np.zeros(900)}, "lz4"), 400, "body"),
    "zstd, a bomb": (lambda: compressed({"item_id": ["a" * 200_000_000]}, "zstd"), 400, "body"),
    "id column of floats": (lambda: stream_of(table_of({"item_id": [1.5]})), 422, "candidates.item_id"),
}


def file_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def with_metadata(rest: bytes) -> bytes:
    return stream_of(pa.table({"item_id": ["i1"]}).replace_schema_metadata({b"slimrank": rest}))


def run_ends() -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([1.0]))


def no_text() -> pa.Array:
    return pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )


def twice() -> pa.Table:
    table = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["price", "price"])
    return table.replace_schema_metadata({"slimrank": '{"user": {}}'})


def batches(count: int) -> bytes:
    table = table_of({"price": np.zeros(count)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", HOSTILE_ARROW)
def test_hostile_arrow_is_refused_by_name(server: str, name: str) -> None:
    build, status, field = HOSTILE_ARROW[name]
    body = build()
    before = peak_bytes()
    answer = httpx.post(f"{server}/v1/rank", content=body, headers={"content-type": MEDIA_TYPE}, timeout=30)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert len(answer.content) < 1000
    assert peak_bytes() - before < 100 << 20
    assert httpx.post(f"{server}/v1/rank", json=GOOD).status_code == 200


def test_shared_buffers_do_not_make_a_small_body_large(ranker: Ranker) -> None:
    """Offsets of every row that name the same megabyte: what is read stays what was sent."""
    text = b"x" * 500_000
    offsets = struct.pack(f"<{LIMIT + 1}i", *[len(text) if n % 2 else 0 for n in range(LIMIT + 1)])
    column = pa.Array.from_buffers(pa.string(), LIMIT, [None, pa.py_buffer(offsets), pa.py_buffer(text)])
    before = peak_bytes()
    assert tried(parse_arrow, stream_of(table_of({"item_id": column, "price": np.zeros(LIMIT)})), ranker) == 400
    assert peak_bytes() - before < 100 << 20


def test_nothing_of_a_refused_request_reaches_the_next(server: str) -> None:
    first = httpx.post(f"{server}/v1/rank", json=GOOD).json()["items"]
    for body in ODD_BODIES[:8]:
        httpx.post(f"{server}/v1/rank", content=body, timeout=30)
    httpx.post(f"{server}/v1/rank", json={**GOOD, "user": {"age": 70, "town": "town-9", "recent": ["i3"]}})
    assert httpx.post(f"{server}/v1/rank", json=GOOD).json()["items"] == first
