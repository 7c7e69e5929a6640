"""The parts of benchmarks/serve.py in which something happens under load: swap, kill, step, overload."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.serve_server import Server
from benchmarks.serve_speed import CANDIDATES, PATIENT, Result, Setting, result
from serve.client import AsyncRankClient, Ranking
from serve.load import HTTP_OK, Answers, arrivals, report, run
from serve.request import RankRequest
from trainer.errors import SlimrankError

CALM = 0.4  # of one replica's capacity: a load that leaves room
STEP = 1.5  # of one replica's capacity: too much for one, not for two
DEPLOY_S = 120.0
SWAP_S = 20.0  # of load after a deploy has begun, beside a part's seconds
SAME_SCORE = 1e-5  # of two processes that run the same code on the same machine
LOOK_S = 0.05


def swap(setting: Setting) -> Iterator[Result]:
    """Deploy another version on one replica under load."""
    rate = CALM * setting.capacity
    with setting.server(**PATIENT) as server:  # a stall is to show as latency, not as refusals
        load = setting.load(server.url, rate, seconds=2 * setting.seconds + SWAP_S, timeout_s=30.0)
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(run, load)
            time.sleep(load.warmup_s + setting.seconds)
            begun = time.monotonic()
            said = _deploy(server, str(setting.world.following.absolute()))
            ended = time.monotonic()
            answers = running.result()
        live = httpx.get(f"{server.url}/readyz", timeout=10, trust_env=False).json()["version"]
    if said is not None:
        yield result("swap under load", None, f"skipped: {said}")
        return
    during = _longest_ms(answers, begun, np.inf)
    yield result(
        "swap: another version live", float(live == setting.world.quality["next"]["version"]), "yes", 1, least=True
    )
    yield result("swap: seconds to deploy", ended - begun, "s")
    yield result("swap: seconds of load after that", max(answers.sent_s) - ended, "s", 0, least=True)
    yield result("swap: failed requests", _failed(answers), f"of {len(answers.outcomes)}", 0)
    yield result("swap: longest latency before", _longest_ms(answers, 0, begun), "ms")
    yield result("swap: longest latency since", during, "ms")
    median = float(np.median(answers.latency_s)) * 1000
    yield result("swap: longest stall (longest latency less the median)", during - median, "ms", 50)


def _deploy(server: Server, artifact: str) -> str | None:
    """None, or why this server cannot."""
    try:
        answer = httpx.post(
            f"{server.admin}/v1/deploy", json={"artifact": artifact, "override": []}, timeout=DEPLOY_S, trust_env=False
        )
    except httpx.ConnectError:
        return "nothing listens on the admin port"
    return None if answer.status_code == HTTP_OK else f"deploy answered {answer.status_code}: {answer.text[:300]}"


def _failed(answers: Answers) -> int:
    return sum(outcome != HTTP_OK for outcome in answers.outcomes)


def _longest_ms(answers: Answers, begin: float, end: float) -> float:
    inside = [s for at, s in zip(answers.sent_s, answers.latency_s, strict=True) if begin <= at < end]
    return max(inside, default=0.0) * 1000


# -- a killed replica --------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What clients saw: good answers, wrong ones, and failures by what they said."""

    good: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)


def kill(setting: Setting) -> Iterator[Result]:
    """Kill one of two replicas half way, while clients that retry once compare each answer with offline."""
    rate = CALM * setting.capacity
    with setting.server((2, 2)) as server:
        before = server.replicas()
        timer = threading.Timer(setting.seconds, lambda: os.kill(before[0], signal.SIGKILL))
        timer.start()
        seen = asyncio.run(_ask_and_compare(setting, server.url, rate))
        timer.join()
        after = server.replicas()
    total = seen.good + seen.wrong + len(seen.failed)
    yield result("kill: the replica is gone", float(before[0] not in after), "yes", 1, least=True)
    yield result(
        "kill: failed requests", len(seen.failed), f"of {total} {sorted(set(seen.failed))[:3] or ''}".strip(), 0
    )
    yield result("kill: wrong answers", seen.wrong, f"of {total}", 0)


async def _ask_and_compare(setting: Setting, url: str, rate: float) -> Seen:
    expected = [_all_scores(setting, asked) for asked in setting.asked]
    seen, version = Seen(), setting.ranker.artifact.version

    async def one(client: AsyncRankClient, number: int) -> None:
        asked = setting.asked[number]
        try:
            answer = await client.rank(asked["user"], asked["candidates"], asked["k"])
        except SlimrankError as error:
            seen.failed.append(str(error).split(" (")[0][:80])
            return
        right = answer.version == version and is_top(answer, expected[number], asked["k"])
        seen.good, seen.wrong = seen.good + right, seen.wrong + (not right)

    begin = time.monotonic()
    async with AsyncRankClient(url, timeout_s=5.0, retries=1) as client, asyncio.TaskGroup() as tasks:
        for number, at in enumerate(arrivals(rate, 2 * setting.seconds, 0)):
            await asyncio.sleep(max(begin + at - time.monotonic(), 0))
            tasks.create_task(one(client, number % len(setting.asked)))
    return seen


def _all_scores(setting: Setting, asked: dict[str, Any]) -> dict[Any, float]:
    answer = setting.ranker.rank(RankRequest.model_validate({**asked, "k": CANDIDATES}))
    return {item.id: item.score for item in answer.items}


def is_top(answer: Ranking, expected: dict[Any, float], k: int) -> bool:
    """Whether each item has its score, and the scores are the k highest; items of one score may change places."""
    best = sorted(expected.values(), reverse=True)[:k]
    found = [item.score for item in answer.items]
    own = all(abs(expected[item.id] - item.score) <= SAME_SCORE for item in answer.items)
    return own and len(found) == len(best) and bool(np.allclose(found, best, rtol=0, atol=SAME_SCORE))


# -- more than one replica can take ------------------------------------------------------------------------------------


def step(setting: Setting) -> Iterator[Result]:
    """From no load to more than one replica can take: when a second one has answered, by HAProxy's counts."""
    rate, wait_s = STEP * setting.capacity, max(setting.seconds, 15.0)
    with setting.server((1, 2)) as server, ThreadPoolExecutor(1) as threads:
        running = threads.submit(run, setting.load(server.url, rate, seconds=wait_s, warmup_s=0.0))
        begun, seconds = time.monotonic(), None
        while not running.done():
            if seconds is None and sum(count > 0 for count in server.answered().values()) > 1:
                seconds = time.monotonic() - begun
            time.sleep(LOOK_S)
        answers = running.result()
    answering = result("step: second replica answering", seconds, "s", 4)
    yield answering if seconds is not None else {**answering, "unit": f"none within {wait_s:g} s", "met": False}
    yield result("step: refused meanwhile", 100 * answers.outcomes.count(429) / len(answers.outcomes), "% of requests")
    yield result(
        "step: failed otherwise", _failed(answers) - answers.outcomes.count(429), f"of {len(answers.outcomes)}"
    )


def overload(setting: Setting) -> Iterator[Result]:
    """One replica at its capacity, and at twice that."""
    capacity = setting.capacity
    with setting.server() as server:
        both = {}
        for times in (1, 2):
            load = setting.load(server.url, times * capacity)
            both[times] = report(load, run(load))
    yield result("capacity of one replica", capacity, "requests/s")
    p99s = {times: found["latency_ms"]["p99"] for times, found in both.items()}
    yield result("p99 of the accepted at capacity", p99s[1], "ms")
    name = "p99 of the accepted at twice capacity"
    yield result(name, p99s[2], "ms", 2, "p99 of the accepted at capacity", p99s[2] / p99s[1])
    for times, found in both.items():
        refused = found["answers"].get("429", 0)
        other = found["sent"] - refused - found["answers"].get("200", 0)
        where = "capacity" if times == 1 else "twice capacity"
        yield result(f"refused at {where}", 100 * refused / found["sent"], "% of requests")
        yield result(f"failed otherwise at {where}", other, f"of {found['sent']}", 0)
        yield result(f"accepted at {where}", found["achieved_rate"], "requests/s")
        yield result(f"load generator at {where}", found["generator_cpu_us_per_request"], "CPU us/request")
        yield result(f"load generator late at {where}, p99", found["late_ms"]["p99"], "ms")
