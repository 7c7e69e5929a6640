"""What the server writes about requests and versions: records with fields, by Python logging. Never a key or a body.

The logger is a child of Ray Serve's own, so under Ray Serve records land in the replica's log file, where its JSON
encoding (LoggingConfig(encoding="JSON")) writes each as one line with its fields, its replica and its time.
"""

from __future__ import annotations

import logging

from serve.trace import Trace

LOG = logging.getLogger("ray.serve.slimrank")
LOG.setLevel(logging.INFO)  # Ray Serve's own steps are logged from WARNING on; these are wanted
# Ray Serve would put its own request id into the record; the field is taken out again before it is written
_OWN: dict[str, object] = {"skip_context_filter": True}


def log_request(method: str, path: str, trace: Trace, error: BaseException | None = None) -> None:
    """One line for a request that is over; with the traceback of what it failed at."""
    fields: dict[str, object] = {
        "request_id": trace.request_id,
        "version": trace.version,
        "status": trace.status,
        "ms": round((trace.answered - trace.read) * 1000, 3),
        "candidates": trace.candidates,
        "key": trace.key,
        "method": method,
        "path": path[:200],
    }
    level = logging.ERROR if trace.status >= 500 else logging.INFO
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    LOG.log(level, "request", extra=_OWN | fields, exc_info=exc_info)


def log_version(version: str, previous: str) -> None:
    """One line for a version that answers from now on in place of another."""
    LOG.info("version", extra=_OWN | {"version": version, "previous": previous})


def log_problem(problem: str) -> None:
    """One line for something that whoever runs the server should mend."""
    LOG.error("problem", extra=_OWN | {"problem": problem})
