"""`slimrank data users` and `slimrank catalogue`: what a server knows of users and items besides its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.options import FILE, PLACE, Group, common
from cluster.output import Progress, emit

if TYPE_CHECKING:
    from trainer.storage import Location


@click.command("users")
@click.option("--config", type=FILE, required=True, help="The run's YAML.")
@click.option(
    "--input", "input_override", type=click.Path(), metavar="GLOB", help="Raw log to read in place of data.input."
)
@click.option("--out", type=FILE, required=True, help="Arrow file to write, for serve.users.")
@common
def users(
    config: Path,
    input_override: str | None,
    out: Path,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """What a raw log says last of each user, so that requests need not give it."""
    from cluster.runs import load
    from trainer.data.users import write_users
    from trainer.progress import size

    result = write_users(load(config, input_override).data, out, Progress().step)
    line = (
        f"{result['known']:,} users with {', '.join(result['columns'])} in {result['users']} ({size(result['bytes'])})"
    )
    emit(result, as_json, [line])


@click.group(cls=Group)
def catalogue() -> None:
    """Item catalogues that take the place of an artifact's own."""


@catalogue.command("build")
@click.option(
    "--artifact", type=PLACE, required=True, help="What 'compress' or 'tune' wrote, which will rank the items."
)
@click.option("--items", type=FILE, required=True, help="Parquet file, one row an item: id, title, item-side columns.")
@click.option("--out", type=FILE, required=True, help="Arrow file to write.")
@common
def catalogue_build(
    artifact: Location,
    items: Path,
    out: Path,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Encode raw items for an artifact, so that they can be served without a new one."""
    from compress.item_file import build_catalogue
    from trainer.progress import size

    result = build_catalogue(artifact, items, out)
    line = f"{result['items']:,} items in {result['catalogue']} ({size(result['bytes'])}): version {result['version']}"
    emit(result, as_json, [line])
