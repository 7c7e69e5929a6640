"""Open-loop load: python -m serve.load --url http://127.0.0.1:8000 --body request.json --rate 50 --seconds 10

Requests are sent at the times of a plan (Poisson arrivals, fixed by a seed) whether or not those before are answered,
and each one's latency counts from the moment it was meant to be sent: a server that stalls makes the requests late that
would have come meanwhile. Says what it costs itself. Needs neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

from trainer.errors import SlimrankError

HTTP_OK = 200
BROKEN, LATE = "broken connection", "no answer in time"
SPAWN = multiprocessing.get_context("spawn")
START_S = 1.0  # for the processes to be up before the first arrival


@dataclass(frozen=True)
class Load:
    """What is asked of a server: `bodies` in turn, `rate` requests a second for `seconds`.

    Requests of the first `warmup_s` are sent beside those and not counted. `connections`: of each process at most; an
    arrival that finds none free waits for one. `timeout_s`: after which an answer is given up.
    """

    url: str
    bodies: tuple[bytes, ...]
    rate: float
    seconds: float
    path: str = "/v1/rank"
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    seed: int = 0
    warmup_s: float = 0.0
    timeout_s: float = 10.0
    connections: int = 256
    processes: int = 1


@dataclass
class Answers:
    """What became of the counted requests, one entry each.

    sent_s: when each was meant to be sent, on time.monotonic()'s clock. latency_s: from then to its last byte.
    late_s: from then to when this generator took it up. outcomes: the status, or what went wrong.
    cpu_s: of this generator, the warm-up included, as `asked` requests.
    """

    sent_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    outcomes: list[int | str] = field(default_factory=list)
    cpu_s: float = 0.0
    asked: int = 0
    opened: int = 0

    def extend(self, other: Answers) -> None:
        """Add what another process has seen."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


# -- the plan and the report: pure -------------------------------------------------------------------------------------


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Seconds from the start at which requests are sent: a Poisson process of `rate` a second, the same for a seed."""
    rng = np.random.default_rng(seed)
    count = int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 10)  # ten deviations more than there will be
    times = np.cumsum(rng.exponential(1 / rate, count))
    return times[times < seconds]


def report(load: Load, answers: Answers) -> dict[str, object]:
    """What `--json` prints: latencies in milliseconds, those of status 200 apart from those of others."""
    outcomes = [str(outcome) for outcome in answers.outcomes]
    good = np.array([outcome == HTTP_OK for outcome in answers.outcomes], dtype=bool)
    latency_s = np.array(answers.latency_s)
    return {
        "url": load.url + load.path,
        "rate": load.rate,
        "seconds": load.seconds,
        "seed": load.seed,
        "sent": len(outcomes),
        "answers": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "achieved_rate": round(int(good.sum()) / load.seconds, 2),
        "latency_ms": summary_ms(latency_s[good]),
        "refused_ms": summary_ms(latency_s[~good]),
        "late_ms": summary_ms(np.array(answers.late_s)),
        "connections_opened": answers.opened,
        "generator_cpu_us_per_request": round(answers.cpu_s / max(answers.asked, 1) * 1e6, 1),
    }


def summary_ms(seconds: np.ndarray) -> dict[str, float] | None:
    """p50, p95, p99 and the longest, in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
    values = {"p50": p50, "p95": p95, "p99": p99, "max": seconds.max() * 1000}
    return {name: round(float(value), 3) for name, value in values.items()}


# -- one connection ----------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection: one request at a time, only the status of its answer is looked at."""

    def __init__(self) -> None:
        self.open = False
        self.status = 0
        self.body = b""
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, request: bytes) -> int:
        """Send a request; the status of its answer, whose body is then in `body`. Raises: ConnectionError."""
        if self._transport is None or not self.open:
            raise ConnectionError("the connection was closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self.body = b""
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it; who waits for an answer gets a ConnectionError."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    # what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = transport, True  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError):  # no request was sent on it yet
            self.close()

    def connection_lost(self, _error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the connection was closed"))

    # what the parser calls

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.open = self.open and self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())


class Pool:
    """Connections to one server: idle ones are used again, the one used last first."""

    def __init__(self, host: str, port: int, most: int) -> None:
        self.host, self.port = host, port
        self.opened = 0
        self._idle: deque[Connection] = deque()
        self._free = asyncio.Semaphore(most)

    async def ask(self, request: bytes) -> int:
        """The status of a request's answer. Raises: OSError when there is none."""
        async with self._free:
            connection = await self._take()
            try:
                status = await connection.ask(request)
            except BaseException:
                connection.close()  # an answer that comes later must not be taken for the next one's
                raise
            if connection.open:
                self._idle.append(connection)
            else:
                connection.close()
            return status

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        self.opened += 1
        _, made = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        return made

    def close(self) -> None:
        """Close all that are idle."""
        while self._idle:
            self._idle.pop().close()


# -- the run -----------------------------------------------------------------------------------------------------------


def request_bytes(load: Load, body: bytes) -> bytes:
    """A whole HTTP/1.1 request."""
    own = {"host": urlsplit(load.url).netloc, "content-length": str(len(body))}
    lines = [f"{name}: {value}\r\n" for name, value in (*own.items(), *load.headers)]
    return f"POST {load.path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


async def send(load: Load, plan: Sequence[tuple[float, int]], begin: float) -> Answers:
    """Send the requests of a plan: (seconds after `begin`, number of its body). `begin` on time.monotonic()'s clock."""
    requests = [request_bytes(load, body) for body in load.bodies]
    host, port = address(load.url)
    pool, found, cpu = Pool(host, port, load.connections), Answers(), time.process_time()

    async def one(at: float, number: int) -> None:
        late = time.monotonic() - at
        outcome: int | str
        try:
            async with asyncio.timeout(load.timeout_s):
                outcome = await pool.ask(requests[number])
        except TimeoutError:
            outcome = LATE
        except OSError:
            outcome = BROKEN
        if at >= begin + load.warmup_s:
            found.sent_s.append(at)
            found.latency_s.append(time.monotonic() - at)
            found.late_s.append(late)
            found.outcomes.append(outcome)

    async with asyncio.TaskGroup() as tasks:
        for offset, number in plan:
            wait = begin + offset - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(begin + offset, number))
    pool.close()
    found.cpu_s, found.asked, found.opened = time.process_time() - cpu, len(plan), pool.opened
    return found


def run(load: Load) -> Answers:
    """Send a load from as many processes as it asks for, the arrivals dealt among them in turn.

    Raises: SlimrankError when the URL is no http:// one, or nothing listens there.
    """
    check_listening(load.url)
    times = arrivals(load.rate, load.warmup_s + load.seconds, load.seed)
    plan = [(float(at), number % len(load.bodies)) for number, at in enumerate(times)]
    if load.processes == 1:
        return uvloop.run(send(load, plan, time.monotonic()))
    begin = time.monotonic() + START_S
    with SPAWN.Pool(load.processes) as pool:
        jobs = [(load, plan[i :: load.processes], begin) for i in range(load.processes)]
        parts = pool.starmap(_send_here, jobs)
    whole = Answers()
    for part in parts:
        whole.extend(part)
    return whole


def _send_here(load: Load, plan: Sequence[tuple[float, int]], begin: float) -> Answers:
    return uvloop.run(send(load, plan, begin))


def address(url: str) -> tuple[str, int]:
    """Host and port of a URL. Raises: SlimrankError when it is not one of http://."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise SlimrankError(f"url {url!r}: {error}") from None
    if parts.scheme != "http" or not host or parts.path.strip("/") or parts.query:
        raise SlimrankError(f"url {url!r}: must be http://HOST:PORT; the route goes to --path")
    return host, port


def check_listening(url: str) -> None:
    """Raises: SlimrankError when nothing listens at a URL."""
    host, port = address(url)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise SlimrankError(f"{url}: nothing listens there ({error}): start the server, or mend --url") from None


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, send, print; 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="http://HOST:PORT")
    parser.add_argument("--path", default=Load.path, help="route to post to; /v1/rank by default")
    parser.add_argument("--body", type=Path, nargs="+", required=True, help="files with bodies, sent in turn")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to count; 10 by default")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before that, not counted; 1 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which an answer is given up")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="one more header")
    parser.add_argument("--connections", type=int, default=256, help="of each process at most")
    parser.add_argument("--processes", type=int, default=1, help="to send from; one sends some thousands a second")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    try:
        load = load_of(args)
        found = report(load, run(load))
    except SlimrankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if args.json else "\n".join(f"{name:<30} {value}" for name, value in found.items()))
    return 0


def load_of(args: argparse.Namespace) -> Load:
    """The load that a command line asks for. Raises: SlimrankError naming the option that breaks a rule."""
    for name in ("rate", "seconds", "timeout", "connections", "processes"):
        if not 0 < getattr(args, name) < float("inf"):
            raise SlimrankError(f"--{name} {getattr(args, name)}: must be above 0")
    if not 0 <= args.warmup < float("inf") or args.seed < 0:
        raise SlimrankError(f"--warmup {args.warmup}, --seed {args.seed}: must be 0 or above")
    if not args.path.startswith("/") or not args.path.isascii() or not args.path.isprintable() or " " in args.path:
        raise SlimrankError(f"--path {args.path!r}: must begin with / and hold plain ASCII without spaces")
    headers = [tuple(part.strip() for part in text.partition(":")[::2]) for text in args.header]
    for (name, value), text in zip(headers, args.header, strict=True):
        if not name or ":" not in text or not (name + value).isprintable() or not (name + value).isascii():
            raise SlimrankError(f"--header {text!r}: must be NAME:VALUE in plain ASCII")
    bodies = [_read(path) for path in args.body]
    kind = "application/vnd.apache.arrow.stream" if args.body[0].suffix == ".arrow" else "application/json"
    typed = (
        headers if any(name.lower() == "content-type" for name, _ in headers) else [("content-type", kind), *headers]
    )
    load = Load(args.url.rstrip("/"), tuple(bodies), args.rate, args.seconds, args.path, tuple(typed), args.seed)
    return replace(
        load,
        warmup_s=args.warmup,
        timeout_s=args.timeout,
        connections=args.connections,
        processes=args.processes,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SlimrankError(f"--body {path}: {error.strerror}: give a file with the body of a request") from None


if __name__ == "__main__":
    sys.exit(main())
