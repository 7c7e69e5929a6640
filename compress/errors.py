"""What goes wrong with plans and artifacts in ways a user can mend."""

from __future__ import annotations

from trainer.errors import SlimrankError


class PlanError(SlimrankError):
    """A compression plan asks for what a table or this format cannot do."""


class ArtifactError(SlimrankError):
    """A folder is not an artifact, or its files are not what was written."""
