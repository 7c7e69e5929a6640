"""The live version beside a reference, as a rule its fp32 artifact: both rankings of one request, and what moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.features import FeatureReader
from serve.request import RankedItem, RankRequest, RankResponse, check_request, decode

SAMPLE = 500  # candidates of a comparison that names none
COMPARE_SCHEMA = {
    "type": "object",
    "title": "CompareRequest",
    "description": "A user, and what to rank for them in both ways; without candidates, items of the catalogue.",
    "required": ["user"],
    "additionalProperties": False,
    "properties": {
        "user": {"type": "object", "additionalProperties": True},
        "candidates": {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        },
        "k": {"type": "integer", "minimum": 1, "default": 10},
    },
    "example": {"user": {"user_id": "196"}, "k": 5},
}


class ComparedItem(RankedItem):
    """An item of one ranking; `rank` here, and `other_rank` in the other ranking, both from 1."""

    rank: int
    other_rank: int | None = None


class Side(BaseModel):
    """One of the two: its version, what its tables take, the milliseconds that ranking took, and its top k."""

    version: str
    table_bytes: int
    artifact_bytes: int
    ms: float
    items: list[ComparedItem]


class CompareResponse(BaseModel):
    """Both rankings of the same candidates. `overlap`: share of the top k that both have, whatever the order."""

    request_id: str
    candidates: int
    k: int
    live: Side
    reference: Side | None = None
    overlap: float | None = None
    user: dict[str, Any] = Field(description="The user's features as they were read, with those of the users' file")


def parse_compare(body: bytes, reader: FeatureReader, max_candidates: int) -> RankRequest:
    """A rank request whose candidates may be left out: then items of the catalogue stand in.

    Raises: RequestError as `check_request` does, and when there is no catalogue to take candidates from.
    """
    asked = decode(body, "body")
    if not isinstance(asked, dict):
        raise RequestError("body", "must be a JSON object with user, candidates and k")
    strange = sorted(set(asked) - {"user", "candidates", "k"})
    if strange:
        raise RequestError(strange[0][:80], "is not part of a comparison: user, candidates and k are")
    if "candidates" not in asked:
        asked = {**asked, "candidates": sample_items(reader, min(SAMPLE, max_candidates))}
        if not asked["candidates"]:
            raise RequestError("candidates", "is required: this model has no item catalogue to take them from")
    if not isinstance(asked["candidates"], list):
        raise RequestError("candidates", "must be a list of item ids, or of objects of raw columns")
    return check_request(asked, max_candidates, RankRequest)


def sample_items(reader: FeatureReader, count: int) -> list[str | int]:
    """Ids of some items: the first of the catalogue, which lies in the order of a hash and so is drawn already."""
    if reader.catalogue is None:
        return []
    ids = reader.catalogue.ids[:count]
    return [i if isinstance(i, str | int) else str(i) for i in ids if i is not None]


def table_bytes(artifact: Artifact) -> int:
    """What the tables take. Of fp32 tables the rows alone, as they would lie in memory without an id map."""
    unpacked = all(tier.bits == 32 for t in artifact.model.lookup.tables for tier in t.tiers)
    return artifact.sizes["table_bytes_fp32" if unpacked else "table_bytes"]


def compared(
    k: int,
    user: dict[str, Any],
    live: tuple[Artifact, RankResponse],
    reference: tuple[Artifact, RankResponse] | None,
) -> CompareResponse:
    """Two answers that hold every candidate, as the top k of each with the item's rank in the other.

    Titles are the live version's, whose catalogue may be newer.
    """
    answer = live[1]
    titles = {item.id: item.title for item in answer.items}
    ids = [item.id for item in answer.items]
    others = [] if reference is None else [item.id for item in reference[1].items]
    return CompareResponse(
        request_id=answer.request_id,
        candidates=len(ids),
        k=k,
        user=user,
        live=_side(*live, k, others, titles),
        reference=None if reference is None else _side(*reference, k, ids, titles),
        overlap=None if reference is None else overlap(ids[:k], others[:k]),
    )


def overlap(first: Sequence[str | int], second: Sequence[str | int]) -> float:
    """Share of the first ids that are among the second, whatever the order."""
    return len(set(first) & set(second)) / len(set(first))


def _side(
    artifact: Artifact,
    answer: RankResponse,
    k: int,
    others: Sequence[str | int],
    titles: Mapping[str | int, str | None],
) -> Side:
    ranks = {name: rank for rank, name in reversed(list(enumerate(others, 1)))}  # the best of an id that is there twice
    items = [
        ComparedItem(**{**dict(item), "title": titles[item.id]}, rank=rank, other_rank=ranks.get(item.id))
        for rank, item in enumerate(answer.items[:k], 1)
    ]
    sizes = artifact.sizes["artifact_bytes"]
    return Side(
        version=answer.version, table_bytes=table_bytes(artifact), artifact_bytes=sizes, ms=answer.ms, items=items
    )
