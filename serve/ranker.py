"""Raw features -> encoded rows -> CompressedModel -> top k. No Ray: the same code answers online and offline.

Legend: K candidates, T tasks.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.explain import MOST_EXPLAINED, Explainer
from serve.features import FeatureReader, Sides
from serve.formula import formula_for
from serve.request import RankedItem, RankRequest, RankResponse, ScoreRequest, ScoreResponse
from trainer.data.batch import to_batch
from trainer.data.encoded import concatenate
from trainer.metrics import sigmoid

TIE_DIGITS = 6
KEPT_SCORES = 64  # of the latest requests, for the figures of drift (serve/drift.py)
ALONE = 16  # candidates from which on a request is scored by itself

Answer = RankResponse | ScoreResponse


def _alone(sides: Sides) -> bool:
    return sides.request is not None and len(sides.items) >= ALONE


class Ranker:
    """Ranks requests with one artifact; `score`: the formula over its tasks that items are ordered by, if any.

    Raises: FormulaError when the formula does not fit the artifact's tasks.
    """

    def __init__(self, artifact: Artifact, score: str | None = None) -> None:
        self.artifact = artifact
        self.tasks = artifact.model.tasks
        self.formula = formula_for(score, self.tasks)
        self.reader = FeatureReader(artifact)
        self.explainer = Explainer(artifact.model)
        self.recent: deque[np.ndarray] = deque(maxlen=KEPT_SCORES)  # probabilities (K, T) of the latest requests
        _ = artifact.model.ranking  # made now, not while the first request waits

    def rank(self, request: RankRequest) -> RankResponse:
        """Answer one request. Raises: RequestError naming a field that cannot be read."""
        return self._one(request)  # type: ignore[return-value]

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score all candidates of one request. Raises: RequestError naming a field that cannot be read."""
        return self._one(request)  # type: ignore[return-value]

    def _one(self, request: ScoreRequest) -> Answer:
        answer = self.answer_many([request])[0]
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def answer_many(self, requests: Sequence[ScoreRequest]) -> list[Answer | RequestError]:
        """Answer several requests with one pass through the model; one that cannot be read does not harm the others.

        A RankRequest gets its top k, another ScoreRequest all scores.
        """
        started = time.perf_counter()
        read: list[tuple[Sides, list[str]] | RequestError] = []
        for request in requests:
            try:
                check_explained(request)
                read.append(self.reader.read_sides(request.user, request.candidates))
            except RequestError as error:
                read.append(error)
        logits = self._score([entry[0] for entry in read if not isinstance(entry, RequestError)])
        answers: list[Answer | RequestError] = []
        for request, entry in zip(requests, read, strict=True):
            if isinstance(entry, RequestError):
                answers.append(entry)
                continue
            sides, ignored = entry
            logits_KT = next(logits)
            answer = (self._top if isinstance(request, RankRequest) else self._all)(request, sides, logits_KT)
            answers.append(self._signed(answer, request, ignored, started))
        return answers

    def rows(self, request: ScoreRequest) -> int:
        """Rows that a request costs: its candidates, and those that explain its items."""
        if not isinstance(request, RankRequest) or not request.explain:
            return request.count
        return request.count + min(request.k, request.count, MOST_EXPLAINED) * (1 + len(self.explainer.features))

    def probabilities(self, request: ScoreRequest) -> np.ndarray:
        """Probabilities (K, T) of the candidates, in their order. Raises: RequestError as `rank`."""
        sides, _ = self.reader.read_sides(request.user, request.candidates)
        return sigmoid(next(self._score([sides])))

    def _score(self, read: Sequence[Sides]) -> Iterator[np.ndarray]:
        """Log-odds (K, T) of each request: large ones by themselves, their user computed once, small ones together.

        Which of both depends on the request alone, so a score does not depend on its neighbours.
        """
        model = self.artifact.model
        together = [self.reader.joined(s) for s in read if not _alone(s)]
        joint = model.logits(to_batch(concatenate(together))) if together else np.zeros((0, 1))
        at = 0
        for sides in read:
            if _alone(sides):
                assert sides.request is not None
                yield model.rank(sides.request, sides.items)
                continue
            yield joint[at : at + len(sides.items)]
            at += len(sides.items)

    def values(self, scores_KT: np.ndarray) -> np.ndarray:
        """What items are ordered by (K,): the first task's probability, or the formula's value."""
        return scores_KT[:, 0] if self.formula is None else self.formula(scores_KT, self.tasks)

    def _top(self, request: Any, sides: Sides, logits_KT: np.ndarray) -> RankResponse:
        scores_KT = sigmoid(logits_KT)
        self.recent.append(scores_KT)
        values = self.values(scores_KT)
        # items that differ by rounding alone keep the request's order, whatever they are scored with
        rounded = values.round(TIE_DIGITS) if self.formula is None else round_each(values, TIE_DIGITS)
        top = np.argsort(-rounded, kind="stable")[: request.k]
        named = self.reader.describe(request.candidates, sides, top.tolist())
        items = [
            RankedItem(id=name, score=score, title=title)
            for (name, title), score in zip(named, values[top].tolist(), strict=True)
        ]
        if len(self.tasks) > 1:
            for item, row in zip(items, scores_KT[top].tolist(), strict=True):
                item.scores = dict(zip(self.tasks, row, strict=True))
        if request.explain:
            rows = self.reader.joined(Sides(sides.request, sides.items.take(top)))
            compared = (lambda z: z[:, 0]) if self.formula is None else (lambda z: self.values(sigmoid(z)))
            for item, parts in zip(items, self.explainer.contributions(rows, compared), strict=True):
                item.contributions = parts
        return RankResponse(request_id="", version=self.artifact.version, items=items, ms=0)

    def _all(self, _request: ScoreRequest, _sides: Sides, logits_KT: np.ndarray) -> ScoreResponse:
        scores_KT = sigmoid(logits_KT)
        self.recent.append(scores_KT)
        tasks = dict(zip(self.tasks, scores_KT.T.tolist(), strict=True)) if len(self.tasks) > 1 else None
        values = self.values(scores_KT).tolist()
        return ScoreResponse(request_id="", version=self.artifact.version, scores=values, tasks=tasks, ms=0)

    def _signed(self, answer: Answer, request: ScoreRequest, ignored: list[str], started: float) -> Answer:
        """The answer with the name of its request, what was ignored of it, and the time it took."""
        answer.request_id = request.request_id or uuid.uuid4().hex
        answer.ignored = ignored or None
        answer.ms = round((time.perf_counter() - started) * 1000, 3)
        return answer


def check_explained(request: ScoreRequest) -> None:
    """Raises: RequestError when more items are to be explained than a request may ask for."""
    if isinstance(request, RankRequest) and request.explain and min(request.k, request.count) > MOST_EXPLAINED:
        raise RequestError("k", f"at most {MOST_EXPLAINED} items are explained: ask for fewer, or leave explain out")


def round_each(values: np.ndarray, digits: int) -> np.ndarray:
    """Values (K,) each to so many significant digits (of base 2 mantissas), so that any scale keeps its order."""
    mantissa, exponent = np.frexp(values)
    with np.errstate(over="ignore"):
        return np.ldexp(mantissa.round(digits), exponent)
