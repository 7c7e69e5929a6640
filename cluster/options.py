"""What the subcommands have in common: their options, and how they end when the user can mend what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cluster.session import quiet
from trainer.errors import SlimrankError

AS_WRITTEN = "slimrank.as_written"  # of click's meta: URIs stay text, as they are another machine's to resolve


class Folder(click.Path):
    """A folder of this machine, as an absolute Path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a URI, which would read as a relative path."""
        if isinstance(value, str) and "://" in value:
            self.fail(f"{value}: must be a folder of this machine, not a URI", param, ctx)
        return super().convert(value, param, ctx)


class Place(Folder):
    """A folder of this machine, or the URI of one in a storage: an absolute Path, or a RemotePath."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Resolve a URI, without asking whether anything is there; where AS_WRITTEN, on another machine."""
        if not isinstance(value, str) or "://" not in value:
            return super().convert(value, param, ctx)
        if ctx is not None and ctx.meta.get(AS_WRITTEN):
            return value
        from trainer.storage import location

        try:
            return location(value)
        except SlimrankError as error:
            self.fail(str(error), param, ctx)


FOLDER = Folder(path_type=Path, file_okay=False, resolve_path=True)
PLACE = Place(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)


class Group(click.Group):
    """A group whose commands end in one clear line when the user can mend what went wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit 2 on a SlimrankError, 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except SlimrankError as error:
            if ctx.find_root().params.get("debug") or "--debug" in sys.argv:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; what was finished is kept: train and tune go on from it with --resume", err=True)
            ctx.exit(130)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every subcommand takes which runs where it is called."""
    address = click.option("--address", metavar="URL", help="Ray cluster to run on; a local one by default.")
    return address(reporting(command))


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every subcommand takes: how it reports."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")(
        command
    )
    return click.option("--debug", is_flag=True, callback=_quieted, help="Show tracebacks and what the libraries say.")(
        command
    )


def _quieted(_context: click.Context, _option: click.Parameter, debug: bool) -> bool:
    """Before a command imports the libraries: they read once whether to be quiet."""
    if not debug:
        quiet()
    return debug
