"""A run's YAML with all sections validated, whichever package owns them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compress.config import CompressionPlan, SearchConfig
from serve.config import ServeConfig
from trainer.config import RunConfig, TrainConfig, describe, load_run, load_yaml
from trainer.errors import ConfigError
from trainer.storage import Location

SERVE_PATHS = ("users", "reference", "keys")
Section = TypeVar("Section", bound=BaseModel)


def section(kind: type[Section], content: dict[str, Any], where: str) -> Section:
    """One section as the package that owns it understands it. Raises: ConfigError naming file and key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from None


def load(path: Path, input_override: str | None = None) -> RunConfig:
    """Read a run and validate every section, so that a mistake shows before any long work.

    Raises: ConfigError naming the file, the key and the rule.
    """
    run = load_run(path, input_override)
    section(CompressionPlan, run.compress, f"{path}: compress")
    section(SearchConfig, run.tune, f"{path}: tune")
    section(ServeConfig, run.serve, f"{path}: serve")
    return run


def with_workers(run: RunConfig, workers: int | None) -> RunConfig:
    """The run with another number of workers, where one is given."""
    if workers is None:
        return run
    train = section(TrainConfig, {**run.train.model_dump(), "workers": workers}, "--workers: train")
    return run.model_copy(update={"train": train})


def search_config(checkpoint: str | Location, changes: Mapping[str, Any]) -> SearchConfig:
    """The search a checkpoint's run asks for, with what the command line changes; None changes nothing."""
    from trainer.checkpoint import open_checkpoint

    asked = dict(open_checkpoint(checkpoint, verify=False).run.tune)
    asked |= {name: value for name, value in changes.items() if value is not None}
    return section(SearchConfig, asked, "tune")


def serve_config(artifact: str | Location, config: Path | None, host: str | None, port: int | None) -> ServeConfig:
    """The artifact's own serving options, or a YAML's, with what the command line changes."""
    from compress.artifact import read_manifest

    if config is None:
        asked, where = dict(read_manifest(artifact)["run"].get("serve", {})), f"{artifact}: serve"
    else:
        content = load_yaml(config)
        asked, where = dict(content.get("serve", {}) if "data" in content else content), str(config)
    if config is not None:  # paths in a YAML are relative to its own folder
        asked |= {k: str(config.parent / asked[k]) for k in SERVE_PATHS if isinstance(asked.get(k), str)}
    asked |= {k: v for k, v in (("host", host), ("port", port)) if v is not None}
    return section(ServeConfig, asked, where)
