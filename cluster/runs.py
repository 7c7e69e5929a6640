"""A run's YAML with all sections validated, whichever package owns them."""

from __future__ import annotations

from pathlib import Path

from trainer.config import RunConfig, load_run


def load(path: Path, input_override: str | None = None) -> RunConfig:
    """Read a run and validate every section, so that a mistake shows before any long work.

    Raises: ConfigError naming the file, the key and the rule.
    """
    return load_run(path, input_override)


def with_workers(run: RunConfig, workers: int | None) -> RunConfig:
    """The run with another number of workers, where one is given."""
    if workers is None:
        return run
    return run.model_copy(update={"train": run.train.model_copy(update={"workers": workers})})
