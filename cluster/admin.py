"""Asks the admin routes of a running server."""

from __future__ import annotations

import os
from typing import Any

import httpx

from trainer.errors import SlimrankError

DEPLOY_S = 3600.0  # a large artifact takes its time; the server itself gives up after serve.ready_timeout_s


def ask(server: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's answer. Raises: SlimrankError in one line when there is none, or it refuses."""
    url = server.rstrip("/") + path
    token = os.environ.get("SLIMRANK_ADMIN_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.request(method, url, json=body, headers=headers, timeout=httpx.Timeout(DEPLOY_S, connect=5))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = str(error) or type(error).__name__
        raise SlimrankError(f"{server}: no answer ({said}): give the admin address of 'slimrank serve'") from None
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict) or (answer.status_code == 200 and "versions" not in content):
        raise SlimrankError(f"{url}: not the admin routes of slimrank: give the admin address that 'serve' prints")
    if answer.status_code != 200:
        reason = content.get("error") or content.get("detail")
        raise SlimrankError(f"{server}: {reason} (HTTP {answer.status_code})")
    return content
