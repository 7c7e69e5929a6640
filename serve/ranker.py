"""Raw features -> encoded rows -> CompressedModel -> top k. No Ray: the same code answers online and offline.

Legend: K candidates, T tasks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import numpy as np

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.features import FeatureReader
from serve.request import RankedItem, RankRequest, RankResponse
from trainer.data.batch import to_batch
from trainer.data.encoded import Encoded, concatenate
from trainer.metrics import sigmoid


class Ranker:
    """Ranks requests with one artifact."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.reader = FeatureReader(artifact)

    def rank(self, request: RankRequest) -> RankResponse:
        """Answer one request. Raises: RequestError naming a field that cannot be read."""
        answer = self.rank_many([request])[0]
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, requests: Sequence[RankRequest]) -> list[RankResponse | RequestError]:
        """Answer several requests with one pass through the model; one that cannot be read does not harm the others."""
        started = time.perf_counter()
        read: list[tuple[Encoded, list[str]] | RequestError] = []
        for request in requests:
            try:
                read.append(self.reader.read(request.user, request.candidates))
            except RequestError as error:
                read.append(error)
        parts = [r[0] for r in read if not isinstance(r, RequestError)]
        logits = self.artifact.model.logits(to_batch(concatenate(parts))) if parts else np.zeros((0, 1))
        answers: list[RankResponse | RequestError] = []
        at = 0
        for request, entry in zip(requests, read, strict=True):
            if isinstance(entry, RequestError):
                answers.append(entry)
                continue
            own = logits[at : at + len(request.candidates)]
            at += len(own)
            ms = (time.perf_counter() - started) * 1000
            answers.append(self._answer(request, own, entry[1], ms))
        return answers

    def _answer(self, request: RankRequest, logits_KT: np.ndarray, ignored: list[str], ms: float) -> RankResponse:
        scores_KT = sigmoid(logits_KT)
        tasks = self.artifact.model.tasks
        top = np.argsort(-scores_KT[:, 0], kind="stable")[: request.k].tolist()
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
