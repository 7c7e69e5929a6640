"""The parts of benchmarks/serve.py about speed and size: http, rate, decode, memory; and what all parts share.

Legend: K candidates.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.artifact import BITS, DIM, HASH_TABLES, in_child, write_artifact
from benchmarks.serve_server import Process, Server, cpu_s, pss_bytes
from benchmarks.serve_world import World
from compress.artifact import load_artifact
from serve.fast_path import free_ports
from serve.load import HTTP_OK, Load, Pool, address, request_bytes
from serve.ranker import Ranker
from serve.request import RankRequest, parse_body

Result = dict[str, Any]

CANDIDATES = 500
BODIES = 64
WARM = 20  # requests before anything is timed
CLIENTS = 4  # that keep a server busy without a queue that is refused
DECODED = 2000
PATIENT = {"max_wait_ms": 10_000.0}  # a server that lets requests wait, where none is to be refused


@dataclass(frozen=True)
class Setting:
    """What the parts run on: the model, seconds of each load, requests of one client, GB of tables (memory)."""

    world: World
    seconds: float
    requests: int
    memory_gb: float

    @functools.cached_property
    def asked(self) -> list[dict[str, Any]]:
        """Requests, decoded."""
        return self.world.requests(BODIES, CANDIDATES)

    @functools.cached_property
    def bodies(self) -> tuple[bytes, ...]:
        """Their bodies."""
        return tuple(json.dumps(asked, separators=(",", ":")).encode() for asked in self.asked)

    @functools.cached_property
    def ranker(self) -> Ranker:
        """What ranks in this process."""
        return Ranker(load_artifact(self.world.artifact))

    @functools.cached_property
    def capacity(self) -> float:
        """Requests a second that one replica answers, kept busy."""
        with self.server(**PATIENT) as server:
            return saturate(server.url, self.bodies, self.seconds, server.cpu_s).rate

    def server(self, replicas: tuple[int, int] = (1, 1), **options: Any) -> Server:
        """`slimrank serve` of the model."""
        return Server(self.world.artifact, replicas, **options)

    def load(self, url: str, rate: float, **changes: Any) -> Load:
        """An open-loop load of these requests, a second of warm-up before it."""
        return Load(url, self.bodies, rate, **{"seconds": self.seconds, "warmup_s": 1.0, **changes})


def result(
    name: str,
    value: float | None,
    unit: str,
    mark: float | None = None,
    ratio_to: str | None = None,
    ratio: float | None = None,
    least: bool = False,
) -> Result:
    """One figure, and whether it, or its ratio where there is one, is at most its mark; or with `least` at least."""
    judged = value if ratio is None else ratio
    line: Result = {"name": name, "value": _round(value), "unit": unit, "ratio_to": ratio_to, "ratio": _round(ratio)}
    if mark is not None:
        line["mark"] = f"{'>=' if least else '<='} {mark:g}"
        line["met"] = None if judged is None else bool(judged >= mark if least else judged <= mark)
    return line


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# -- one client --------------------------------------------------------------------------------------------------------


def http(setting: Setting) -> Iterator[Result]:
    """One client: milliseconds in process and over HTTP, the same requests in turns."""
    with setting.server() as server:
        inside, over = uvloop.run(_in_turns(setting, server.url))
    for q, mark in ((50, 1.0), (99, 3.0)):
        own, whole = np.percentile(inside, q) * 1000, np.percentile(over, q) * 1000
        yield result(f"in process, p{q}", own, "ms")
        yield result(f"over HTTP, p{q}", whole, "ms", ratio_to=f"in process, p{q}", ratio=whole / own)
        yield result(f"over HTTP minus in process, p{q}", whole - own, "ms", mark)


async def _in_turns(setting: Setting, url: str) -> tuple[list[float], list[float]]:
    pool, load = Pool(*address(url), 1), Load(url, setting.bodies, 1, 1)
    inside, over = [], []
    for turn in range(WARM + setting.requests):
        asked = RankRequest.model_validate(setting.asked[turn % BODIES])
        request = request_bytes(load, setting.bodies[turn % BODIES])
        begun = time.perf_counter()
        setting.ranker.rank(asked)
        between = time.perf_counter()
        status = await pool.ask(request)
        ended = time.perf_counter()
        assert status == HTTP_OK, status
        if turn >= WARM:
            inside.append(between - begun)
            over.append(ended - between)
    pool.close()
    return inside, over


# -- how many ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saturated:
    """A server kept busy: requests a second, and CPU seconds of the server and of the generator for each."""

    rate: float
    server_cpu_s: float
    generator_cpu_s: float


def saturate(
    url: str, bodies: Sequence[bytes], seconds: float, server_cpu_s: Callable[[], float], clients: int = CLIENTS
) -> Saturated:
    """Keep a server busy with clients that ask again as soon as they are answered."""
    return uvloop.run(_saturate(url, bodies, seconds, server_cpu_s, clients))


async def _saturate(
    url: str, bodies: Sequence[bytes], seconds: float, server_cpu_s: Callable[[], float], clients: int
) -> Saturated:
    pool, load = Pool(*address(url), clients), Load(url, tuple(bodies), 1, 1)
    requests = [request_bytes(load, body) for body in bodies]

    async def ask(number: int, until: float) -> int:
        answered = 0
        while time.perf_counter() < until:
            status = await pool.ask(requests[(number + answered * clients) % len(requests)])
            assert status == HTTP_OK, status
            answered += 1
        return answered

    for number in range(WARM):
        await pool.ask(requests[number % len(requests)])
    begun, server, own = time.perf_counter(), server_cpu_s(), time.process_time()
    counts = await asyncio.gather(*(ask(number, begun + seconds) for number in range(clients)))
    taken, total = time.perf_counter() - begun, sum(counts)
    pool.close()
    return Saturated(total / taken, (server_cpu_s() - server) / total, (time.process_time() - own) / total)


def rate(setting: Setting) -> Iterator[Result]:
    """Items a second per core: of CPU time, since the generator has the cores, too. The server's holds the proxy's."""
    inside = CANDIDATES / in_process_cpu_s(setting)
    yield result("in process", inside, "items/s/core")
    with setting.server(**PATIENT) as server:
        ours = saturate(server.url, setting.bodies, setting.seconds, server.cpu_s)
    per_core = CANDIDATES / ours.server_cpu_s
    name = "end to end"
    yield result(name, per_core, "items/s/core", 0.9, "in process", per_core / inside, least=True)
    yield result("end to end, one replica kept busy", ours.rate, "requests/s")
    yield result("load generator", ours.generator_cpu_s * 1e6, "CPU us/request")
    for model, label in (("same", "the same model"), ("torchrec", "TorchRec's DLRM")):
        theirs = _eager(setting, model)
        name = f"{label}, eager fp32, FastAPI + uvicorn"
        rival = CANDIDATES / theirs.server_cpu_s
        yield result(name, rival, "items/s/core")
        yield result(f"end to end, times {label}", per_core, "items/s/core", 15, name, per_core / rival, least=True)


def in_process_cpu_s(setting: Setting) -> float:
    """CPU seconds of ranking one request in this process, which does nothing else."""
    asked = [RankRequest.model_validate(a) for a in setting.asked]
    for request in asked[:WARM]:
        setting.ranker.rank(request)
    begun, count, until = time.process_time(), 0, time.perf_counter() + setting.seconds
    while time.perf_counter() < until:
        setting.ranker.rank(asked[count % BODIES])
        count += 1
    return (time.process_time() - begun) / count


def _eager(setting: Setting, model: str) -> Saturated:
    port = free_ports(1)[0]
    folder = Path(tempfile.mkdtemp(prefix="eager-"))
    app = Process(["benchmarks/eager_app.py", str(setting.world.folder), str(port), model], folder, {})
    url = f"http://127.0.0.1:{port}"
    try:
        app.wait(f"{url}/healthz")
        return saturate(url, setting.bodies, setting.seconds, lambda: cpu_s(app.child.pid), clients=1)
    finally:
        app.stop()
        shutil.rmtree(folder, ignore_errors=True)


# -- bodies ------------------------------------------------------------------------------------------------------------


def decode(setting: Setting) -> Iterator[Result]:
    """Decoding and validating the body of an ids-only request: as JSON, and as Arrow."""
    body = json.dumps({"user": {"user_id": "196", "age": 49}, "candidates": setting.asked[0]["candidates"], "k": 10})
    raw = body.encode()
    yield result("decode a JSON body of 500 ids", _median_ms(lambda: parse_body(raw, 10_000)), "ms", 0.2)
    yield result("its size", len(raw), "bytes")
    read = arrow_reader()
    if read is None:
        yield result("decode an Arrow body of 500 ids", None, "skipped: this server reads no Arrow")
        return
    arrow = arrow_body(json.loads(body))
    yield result("decode an Arrow body of 500 ids", _median_ms(lambda: read(arrow)), "ms", 0.2)
    yield result("its size", len(arrow), "bytes")


def arrow_reader() -> Callable[[bytes], Any] | None:
    """What reads an Arrow body; None where there is none yet."""
    try:
        from serve import arrow_body as module
    except ImportError:
        return None
    return lambda body: module.parse_arrow(body, 10_000)


def arrow_body(asked: dict[str, Any]) -> bytes:
    """The client's Arrow body of an ids-only request."""
    import pyarrow as pa

    from benchmarks.serve_world import ITEM
    from serve.client_messages import encode

    return encode(asked["user"], pa.table({ITEM: asked["candidates"]}), {"k": asked["k"]}).body


def _median_ms(function: Callable[[], Any]) -> float:
    taken = []
    for _ in range(DECODED):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken)) * 1000


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[Result]:
    """PSS of all replicas, with one and with two, over tables that outweigh the libraries."""
    folder = Path(tempfile.mkdtemp(prefix="memory-", dir=setting.world.folder.parent))
    cache = os.environ.get("SLIMRANK_CACHE")
    os.environ["SLIMRANK_CACHE"] = str(folder / "cache")
    try:
        names = [f"C{i + 1}" for i in range(HASH_TABLES)]
        rows = int(setting.memory_gb * 1000**3 / HASH_TABLES / (DIM * BITS // 8 + 4))
        size = in_child(write_artifact, folder / "artifact", dict.fromkeys(names, rows), 0)[1]
        candidates = [{name: f"{name}-{i}" for name in names} for i in range(CANDIDATES)]
        body = json.dumps({"user": {}, "candidates": candidates}).encode()
        one, two = (_pss(folder / "artifact", replicas, body) for replicas in (1, 2))
    finally:
        shutil.rmtree(folder)
        os.environ.pop("SLIMRANK_CACHE")
        if cache is not None:
            os.environ["SLIMRANK_CACHE"] = cache
    yield result("tables of the memory part", size / 1000**3, "GB")
    yield result("one replica, PSS", one / 2**20, "MiB")
    yield result("two replicas, PSS", two / 2**20, "MiB")
    yield result("second replica adds, of the tables", 100 * (two - one) / size, "%", 5)


def _pss(artifact: Path, replicas: int, body: bytes) -> int:
    with Server(artifact, (replicas, replicas), **PATIENT) as server:
        saturate(server.url, [body], 2.0, lambda: 0.0, clients=1)
        return sum(pss_bytes(pid) for pid in server.replicas())
