"""How long work says how far it has come, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

ReportProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are."""
