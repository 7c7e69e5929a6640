"""Rank a request from a file: the same code as online, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.arrow_body import parse_arrow
from serve.config import ServeConfig
from serve.errors import RequestError
from serve.request import parse_body
from serve.shelf import load
from trainer.storage import Location

ARROW = b"\xff\xff\xff\xff"  # what an Arrow stream begins with, and JSON cannot


def rank_file(artifact: str | Location, request_file: Path, config: ServeConfig | None = None) -> dict[str, Any]:
    """Answer the request in a file, JSON or an Arrow stream, with an artifact, as `POST /v1/rank` would.

    `config`: what the server is started with; its limits, formula and users apply here too.
    Raises: SlimrankError when the artifact cannot be loaded or the request is refused, naming its field.
    """
    config = config or ServeConfig()
    try:
        body = request_file.read_bytes()
    except FileNotFoundError:
        raise RequestError("request", f"{request_file}: no such file: give a file with the body of a request") from None
    except OSError as error:
        raise RequestError("request", f"{request_file}: not a readable file: {error}") from None
    try:
        parse = parse_arrow if body.startswith(ARROW) else parse_body
        request = parse(body, config.max_candidates)
    except RequestError as error:
        raise RequestError(error.field, f"{request_file}: {error.message}", error.status) from None
    return load(str(artifact), config.score, config.users).ranker.rank(request).model_dump(exclude_none=True)
