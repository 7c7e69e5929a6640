"""`slimrank key ...`: each parses, calls, and prints. The file of keys is serve/keys.py's."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import FILE, Group, reporting
from cluster.output import emit

KEYS = click.option("--file", "path", type=FILE, required=True, help="The file of keys, as serve.keys names it.")
NAME = click.option("--name", required=True, help="Whose key it is: letters, digits, '_', '.', '-'.")


@click.group(cls=Group)
def key() -> None:
    """Make, list and revoke API keys of the server; their hashes are kept, the keys nowhere."""


@key.command("new")
@NAME
@KEYS
@click.option("--requests-per-s", type=float, help="Limit over all replicas; none by default.")
@click.option("--candidates-per-s", type=float, help="Limit over all replicas; none by default.")
@reporting
def key_new(
    name: str,
    path: Path,
    requests_per_s: float | None,
    candidates_per_s: float | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001
) -> None:
    """Make a key and print it, this once. A server that runs takes it within a second."""
    from serve.keys import new_key

    secret = new_key(path, name, requests_per_s, candidates_per_s)
    emit({"name": name, "key": secret, "file": str(path)}, as_json, [secret])


@key.command("list")
@KEYS
@reporting
def key_list(path: Path, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Names, dates and limits; the keys themselves cannot be shown."""
    from serve.keys import read_keys

    keys = [k.model_dump(exclude={"sha256"}) for k in read_keys(path).keys]
    emit({"keys": keys}, as_json, [key_line(k) for k in keys] or ["no keys"])


@key.command("revoke")
@NAME
@KEYS
@reporting
def key_revoke(name: str, path: Path, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Refuse a key from now on (403); servers that run do so within a second."""
    from serve.keys import revoke_key

    revoked = revoke_key(path, name).model_dump(exclude={"sha256"})
    emit(revoked, as_json, [key_line(revoked)])


def key_line(key: dict[str, str | float | None]) -> str:
    """One key as a line: name, dates, limits."""
    limits = [f"{key[f'{what}_per_s']:g} {what}/s" for what in ("requests", "candidates") if key[f"{what}_per_s"]]
    dates = [f"made {key['created']}", *([f"REVOKED {key['revoked']}"] if key["revoked"] else [])]
    return "  ".join([str(key["name"]), *dates, ", ".join(limits) or "no limits"])
