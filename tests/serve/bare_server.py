"""The API of a ranker on bare uvicorn, in a thread of the tests' process: all that Ray Serve does not add."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import uvicorn

from serve.api import make_api
from serve.config import ServeConfig
from serve.ranker import Ranker
from serve.service import Service
from serve.shelf import Served, Shelf

START_S = 30


@contextmanager
def bare_server(ranker: Ranker, **options: Any) -> Iterator[str]:
    """Serve on a free port of loopback; give the URL. Nothing is shed unless `options` of ServeConfig say so."""
    version = ranker.artifact.version
    config = ServeConfig(**{"max_wait_ms": 60_000, **options})
    service = Service(Shelf(Served(version, str(ranker.artifact.folder), ranker)), config)
    server = uvicorn.Server(uvicorn.Config(make_api(service), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        service.engine.stop()


def stream_of(table: pa.Table, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
