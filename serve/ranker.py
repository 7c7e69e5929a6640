"""Raw features -> encoded rows -> CompressedModel -> top k. No Ray: the same code answers online and offline.

Legend: K candidates, T tasks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.features import FeatureReader, Sides
from serve.request import RankedItem, RankRequest, RankResponse
from trainer.data.batch import to_batch
from trainer.data.encoded import concatenate
from trainer.metrics import sigmoid

TIE_DIGITS = 6
ALONE = 16  # candidates from which on a request is scored by itself


def _alone(sides: Sides) -> bool:
    return sides.request is not None and len(sides.items) >= ALONE


class Ranker:
    """Ranks requests with one artifact."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.reader = FeatureReader(artifact)
        _ = artifact.model.ranking  # made now, not while the first request waits

    def rank(self, request: RankRequest) -> RankResponse:
        """Answer one request. Raises: RequestError naming a field that cannot be read."""
        answer = self.rank_many([request])[0]
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, requests: Sequence[RankRequest]) -> list[RankResponse | RequestError]:
        """Answer several requests with one pass through the model; one that cannot be read does not harm the others."""
        started = time.perf_counter()
        read: list[tuple[Sides, list[str]] | RequestError] = []
        for request in requests:
            try:
                read.append(self.reader.read_sides(request.user, request.candidates))
            except RequestError as error:
                read.append(error)
        logits = self._score([entry[0] for entry in read if not isinstance(entry, RequestError)])
        answers: list[RankResponse | RequestError] = []
        for request, entry in zip(requests, read, strict=True):
            if isinstance(entry, RequestError):
                answers.append(entry)
                continue
            ms = (time.perf_counter() - started) * 1000
            answers.append(self._answer(request, next(logits), entry[1], ms))
        return answers

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

    def _answer(self, request: RankRequest, logits_KT: np.ndarray, ignored: list[str], ms: float) -> RankResponse:
        scores_KT = sigmoid(logits_KT)
        tasks = self.artifact.model.tasks
        # items that differ by rounding alone keep the request's order, whatever they are scored with
        top = np.argsort(-scores_KT[:, 0].round(TIE_DIGITS), kind="stable")[: request.k].tolist()
        items = []
        for index, (name, title) in zip(top, self.reader.describe(request.candidates, top), strict=True):
            every = dict(zip(tasks, scores_KT[index].tolist(), strict=True)) if len(tasks) > 1 else None
            items.append(RankedItem(id=name, score=float(scores_KT[index, 0]), title=title, scores=every))
        return RankResponse(
            request_id=uuid.uuid4().hex,
            version=self.artifact.version,
            items=items,
            ms=round(ms, 3),
            ignored=ignored or None,
        )
