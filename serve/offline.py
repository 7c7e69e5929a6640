"""Rank a request from a file: the same code as online, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.artifact import load_artifact
from serve.config import ServeConfig
from serve.errors import RequestError
from serve.ranker import Ranker
from serve.request import parse_request, refuse_constant
from trainer.storage import Location


def rank_file(artifact: str | Location, request_file: Path) -> dict[str, Any]:
    """Answer the request in a JSON file with an artifact, as `POST /v1/rank` would.

    Raises: SlimrankError when the artifact cannot be loaded or the request is refused, naming its field.
    """
    try:
        body = json.loads(request_file.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except FileNotFoundError:
        raise RequestError("request", f"{request_file}: no such file: give a file with the body of a request") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError("body", f"{request_file}: not a readable JSON file: {error}") from None
    request = parse_request(body, ServeConfig().max_candidates)
    return Ranker(load_artifact(artifact)).rank(request).model_dump(exclude_none=True)
