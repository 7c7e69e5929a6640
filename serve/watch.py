"""Answers with the version that is live, counts how each version does, and keeps recent requests for a comparison."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from serve.engine import OVERHEAD
from serve.errors import RequestError
from serve.health import Counter, Health
from serve.ranker import Answer
from serve.request import ScoreRequest
from serve.shelf import Served, Shelf

MOST_VALUES = 1_000_000  # of all requests kept: some 60 MB of Python values


class Watch:
    """Stands between the queue and the shelf. `answer` is called by the scoring thread alone."""

    def __init__(self, shelf: Shelf, keep: int, candidates: Callable[[ScoreRequest], int]) -> None:
        self.shelf, self.candidates = shelf, candidates
        self.recent = Recent(keep)
        self.counters: dict[str, Counter] = {}

    def answer(self, requests: Sequence[ScoreRequest]) -> list[Answer | Exception]:
        """An answer to each request, all of one version but those that it fails on while it is on probation."""
        live, fallback = self.shelf.live, self.shelf.fallback
        started = time.perf_counter()
        answers = attempt(live, requests)
        seconds = time.perf_counter() - started
        failed = [i for i, answer in enumerate(answers) if isinstance(answer, Exception)]
        errors = sum(not isinstance(answers[i], RequestError) for i in failed)
        if failed and fallback is not None and fallback is not live:
            second = dict(zip(failed, attempt(fallback, [requests[i] for i in failed]), strict=True))
            mended = {i: answer for i, answer in second.items() if not isinstance(answer, Exception)}
            answers = [mended.get(i, answer) for i, answer in enumerate(answers)]
            errors = len(mended)  # what neither version can answer tells nothing of this one
        candidates = sum(self.candidates(r) + OVERHEAD for r in requests)
        self._counter(live.version).count(len(requests), errors, seconds / candidates)
        self.recent.add([r for r, a in zip(requests, answers, strict=True) if not isinstance(a, Exception)])
        return answers

    def _counter(self, version: str) -> Counter:
        counter = self.counters.get(version)
        if counter is None:
            counter = self.counters[version] = Counter()
        return counter

    def health(self) -> dict[str, Health]:
        """Counts of the versions that are loaded."""
        for name in [n for n in list(self.counters) if n not in self.shelf.loaded]:
            self.forget(name)
        return {name: counter.snapshot() for name, counter in list(self.counters.items())}

    def forget(self, version: str) -> None:
        """Count a version from zero: it begins to answer."""
        self.counters.pop(version, None)


class Recent:
    """The last requests that were answered, bounded in number and in size."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.values = 0
        self.requests: deque[tuple[int, ScoreRequest]] = deque()

    def add(self, requests: Sequence[ScoreRequest]) -> None:
        """Keep these, and forget the oldest."""
        for request in requests[-self.keep :]:
            size = values_in(request)
            if size > MOST_VALUES // 4:  # one of these would stand for too many others
                continue
            self.requests.append((size, request))
            self.values += size
            while len(self.requests) > self.keep or self.values > MOST_VALUES:
                self.values -= self.requests.popleft()[0]

    def copy(self) -> list[ScoreRequest]:
        """The requests kept, from another thread."""
        return [request for _, request in list(self.requests)]


def values_in(request: ScoreRequest) -> int:
    """About how many values a request holds."""
    candidates: Any = request.candidates
    if isinstance(candidates, list):
        wide = len(candidates[0]) if isinstance(candidates[0], dict) else 1
        return len(request.user) + len(candidates) * max(wide, 1)
    if isinstance(candidates, dict):
        return len(request.user) + sum(map(len, candidates.values()))
    return len(request.user) + candidates.num_rows * candidates.num_columns


def attempt(served: Served, requests: Sequence[ScoreRequest]) -> list[Answer | Exception]:
    """A version's answers; where it fails as a whole, each request by itself, so that one does not harm others."""
    try:
        return list(served.ranker.answer_many(requests))
    except Exception as error:  # whatever it is, whoever asked must hear of it, and the others be served
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in attempt(served, [request])]
