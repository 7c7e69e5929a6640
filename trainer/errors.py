"""What goes wrong in ways a user can mend. Each message names the object, the value, the rule and the next step.

The command prints these as one line and exits with 2; anything else is a defect and keeps its traceback.
"""


class SlimrankError(ValueError):
    """A mistake in what the user gave, or a file that cannot be used: one clear line, no traceback."""


class ConfigError(SlimrankError):
    """The run's YAML, or an option of the command, breaks a rule."""


class DataError(SlimrankError):
    """The log, or prepared data, cannot be used as the schema says."""


class CheckpointError(SlimrankError):
    """A folder is not a checkpoint, or its files are not what was written."""


class StorageError(SlimrankError):
    """A storage that a URI names does not answer, refuses, or lacks what was asked of it."""
