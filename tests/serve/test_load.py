"""The load generator: its plan, and what it says of servers that answer, refuse, stall and break."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from http_servers import answer, listening, read_request

from serve.load import BROKEN, LATE, Load, arrivals, main, report, run
from trainer.errors import SlimrankError


def load_on(url: str, **changes: object) -> Load:
    """200 requests a second for half a second."""
    return Load(**{"url": url, "bodies": (b"{}",), "rate": 200.0, "seconds": 0.5, "timeout_s": 5.0, **changes})


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_within_the_time_and_fixed_by_the_seed() -> None:
    times = arrivals(100, 200, 3)
    gaps = np.diff(times)
    assert (gaps > 0).all()
    assert times[-1] < 200
    assert abs(len(times) - 20_000) < 5 * 20_000**0.5
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # an exponential's deviation is its mean
    assert np.array_equal(times, arrivals(100, 200, 3))
    assert not np.array_equal(times[:50], arrivals(100, 200, 4)[:50])


# -- runs against real sockets -----------------------------------------------------------------------------------------


def test_load_sends_the_bodies_in_turn_with_their_headers_over_kept_connections() -> None:
    seen: list[tuple[str, dict[str, str], bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(answer(200))

    with listening(serve) as url:
        load = load_on(url, bodies=(b"one", b"two!"), headers=(("x-api-key", "k"),), path="/p")
        found = report(load, run(load))
    expected = len(arrivals(200, 0.5, 0))
    assert found["sent"] == expected
    assert found["answers"] == {"200": expected}
    assert found["achieved_rate"] == expected / 0.5
    assert abs(sum(body == b"one" for _, _, body in seen) * 2 - expected) <= 1
    assert {line for line, _, _ in seen} == {"POST /p HTTP/1.1"}
    assert all(headers["x-api-key"] == "k" and headers["host"] == url[7:] for _, headers, _ in seen)
    assert found["connections_opened"] < expected  # kept, and used again
    assert found["generator_cpu_us_per_request"] > 0


def test_latency_counts_from_the_intended_arrival() -> None:
    """A server that answers one request at a time, each after 20 ms, cannot hide that the queue grows."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            await read_request(reader)
            await asyncio.sleep(0.02)
            writer.write(answer(200))

    with listening(serve) as url:
        load = load_on(url, connections=1)
        answers = run(load)
    count = len(answers.outcomes)
    order = np.argsort(answers.sent_s)
    assert set(answers.outcomes) == {200}
    # one after another: the last is answered no earlier than 20 ms times all of them after the first was sent
    span = np.array(answers.sent_s)[order[-1]] - np.array(answers.sent_s)[order[0]]
    assert np.array(answers.latency_s)[order[-1]] >= 0.02 * count - span - 0.005
    assert answers.opened == 1


def test_refusals_are_counted_by_status_apart_from_answers() -> None:
    count = iter(range(1_000_000))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            await read_request(reader)
            writer.write(answer(429 if next(count) % 2 else 200, more="retry-after: 1\r\n"))

    with listening(serve) as url:
        load = load_on(url)
        found = report(load, run(load))
    assert set(found["answers"]) == {"200", "429"}
    assert sum(found["answers"].values()) == found["sent"]
    assert found["achieved_rate"] == found["answers"]["200"] / 0.5
    assert found["refused_ms"] is not None


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        (b"", BROKEN),  # closes at once
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhal", BROKEN),  # closes half way
        (b"this is no HTTP\r\n\r\n", BROKEN),
    ],
)
def test_broken_answers_are_named_and_others_go_on(sent: bytes, outcome: str) -> None:
    first = iter([True])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            await read_request(reader)
            if next(first, False):
                writer.write(sent)
                return
            writer.write(answer(200))

    with listening(serve) as url:
        load = load_on(url)
        found = report(load, run(load))
    assert found["answers"] == {"200": found["sent"] - 1, outcome: 1}


def test_chunked_answers_and_closing_servers_are_understood() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        await writer.drain()

    with listening(serve) as url:
        load = load_on(url, rate=50.0)
        found = report(load, run(load))
    assert found["answers"] == {"200": found["sent"]}
    assert found["connections_opened"] == found["sent"]


def test_an_answer_that_never_comes_is_given_up_and_harms_no_other() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            await read_request(reader)
            if number % 2:
                await asyncio.sleep(60)
            writer.write(answer(200))

    with listening(serve) as url:
        load = load_on(url, rate=40.0, timeout_s=0.2)
        found = report(load, run(load))
    assert found["answers"][LATE] >= 1
    assert found["answers"][LATE] + found["answers"].get("200", 0) == found["sent"]


def test_several_processes_send_the_same_plan() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            await read_request(reader)
            writer.write(answer(200))

    with listening(serve) as url:
        load = load_on(url, processes=2, warmup_s=0.2)
        found = report(load, run(load))
    planned = arrivals(200, 0.7, 0)
    assert found["answers"] == {"200": int((planned >= 0.2).sum())}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--url": "https://127.0.0.1:1"}, "must be http://HOST:PORT"),
        ({"--url": "http://127.0.0.1:99999"}, "url"),
        ({"--url": "http://127.0.0.1:1"}, "nothing listens there"),
        ({"--rate": "0"}, "--rate 0.0: must be above 0"),
        ({"--rate": "nan"}, "--rate nan"),
        ({"--seconds": "-1"}, "--seconds"),
        ({"--header": "no colon"}, "--header"),
        ({"--header": "a: b\r\nc: d"}, "--header"),
        ({"--path": "v1/rank"}, "--path"),
        ({"--body": "/nowhere/body.json"}, "--body /nowhere/body.json"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    changes: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = tmp_path / "body.json"
    body.write_text("{}")
    options = {"--url": "http://127.0.0.1:1", "--rate": "5", "--body": str(body), **changes}
    assert main([part for pair in options.items() for part in pair]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: set[str] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            _, headers, _ = await read_request(reader)
            kinds.add(headers["content-type"])
            writer.write(answer(200))

    (tmp_path / "body.arrow").write_bytes(b"x")
    with listening(serve) as url:
        code = main(f"--url {url} --body {tmp_path}/body.arrow --rate 50 --seconds 0.3 --warmup 0 --json".split())
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == {"200": found["sent"]}
    assert kinds == {"application/vnd.apache.arrow.stream"}


def test_run_says_when_nothing_listens() -> None:
    with pytest.raises(SlimrankError, match="nothing listens there"):
        run(load_on("http://127.0.0.1:1"))
