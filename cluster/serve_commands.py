"""`slimrank serve`, `rank`, and what changes the version of a running server: each parses, calls, and prints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import FILE, PLACE, common, reporting
from cluster.output import emit

if TYPE_CHECKING:  # pyarrow is a third of a second that --help has not
    from trainer.storage import Location

ADMIN = "http://127.0.0.1:8001"


@click.command()
@click.option("--artifact", type=PLACE, required=True, help="What 'compress' or 'tune' wrote.")
@click.option("--config", type=FILE, help="YAML with serving options (a run's serve section, or these alone).")
@click.option("--host", help="Address to listen on; loopback by default.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; 8000 by default.")
@common
def serve(
    artifact: Location,
    config: Path | None,
    host: str | None,
    port: int | None,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Serve an artifact over HTTP with Ray Serve until Ctrl-C."""
    from cluster.runs import serve_config
    from cluster.session import ray_session
    from compress.artifact import load_artifact
    from serve.pages import check_files

    options = serve_config(artifact, config, host, port)
    opened = load_artifact(artifact)
    check_files(opened, options)
    version = opened.version
    with ray_session(address, debug=debug):
        from serve.app import admin_url, start, stop

        url, admin = start(opened.folder, options, version), admin_url(options)  # of a storage: the copy here
        page = [f"the page: {url}/"] if options.page else []
        lines = [f"serving {version} at {url}", *page, f"the API: {url}/docs", f"admin: {admin} (deploy, versions)"]
        emit({"url": url, "admin": admin, "version": version}, as_json, lines)
        try:
            wait_for_signal()
        finally:
            stop()


@click.command()
@click.option("--artifact", type=PLACE, required=True, help="What 'compress' or 'tune' wrote.")
@click.option("--request", "request_file", type=FILE, required=True, help="The body of POST /v1/rank, as a file.")
@click.option("--config", type=FILE, help="As for 'serve': its formula, users and limits apply.")
@common
def rank(
    artifact: Location,
    request_file: Path,
    config: Path | None,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Rank offline: the answer the server would give."""
    from cluster.runs import serve_config
    from cluster.tables import ranked_table
    from serve.offline import rank_file

    result = rank_file(artifact, request_file, serve_config(artifact, config, None, None))
    emit(result, as_json, ranked_table(result))


server = click.option(
    "--server", metavar="URL", default=ADMIN, show_default=True, help="The admin address that 'serve' prints."
)


@click.command()
@click.argument("artifact", metavar="ARTIFACT", type=PLACE)
@server
@click.option(
    "--override",
    multiple=True,
    type=click.Choice(["overlap", "calibration"]),
    help="Deploy although this comparison with the live version fails; may be given twice.",
)
@click.option("--catalogue", type=PLACE, help="What 'catalogue build' wrote, in place of the artifact's own items.")
@reporting
def deploy(
    artifact: Location,
    server: str,
    override: tuple[str, ...],
    catalogue: Location | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001
) -> None:
    """Replace the version that a running server answers with.

    Every replica loads and verifies ARTIFACT and ranks recent requests with both versions; where they agree, the new
    one answers from then on, and the old one stays loaded for 'rollback'. SLIMRANK_ADMIN_TOKEN: the server's token.
    """
    from cluster.admin import ask

    asked: dict[str, Any] = {"artifact": str(artifact), "override": list(override)}
    if catalogue is not None:
        asked["catalogue"] = str(catalogue)
    result = ask(server, "POST", "/v1/deploy", asked)
    emit(result, as_json, deployed_lines(result))


@click.command()
@server
@reporting
def versions(server: str, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """The versions that a running server knows, and what its replicas hold."""
    from cluster.admin import ask

    result = ask(server, "GET", "/v1/versions")
    emit(result, as_json, versions_lines(result))


@click.command()
@server
@reporting
def rollback(server: str, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Go back to the previous version at once; a second time: forward again."""
    from cluster.admin import ask

    result = ask(server, "POST", "/v1/rollback")
    emit(result, as_json, [f"{result['live']} is live again", *versions_lines(result)])


def deployed_lines(result: Mapping[str, Any]) -> list[str]:
    """What a deploy came to."""
    live = next(v for v in result["versions"] if v["version"] == result["live"])
    lines = [f"{result['live']} is live; {result['previous']} stays loaded for 'slimrank rollback'"]
    agreement = live["agreement"]
    if agreement is not None:
        ratios = ", ".join(f"{t} {'-' if r is None else f'{r:.3f}'}" for t, r in agreement["calibration"].items())
        lines.append(
            f"top-k overlap {agreement['overlap']:.3f} on {agreement['requests']} {agreement['source']}, "
            f"mean score new/old: {ratios}"
        )
    if live["overridden"]:
        lines.append(f"overridden: {', '.join(live['overridden'])}")
    return lines


def versions_lines(result: Mapping[str, Any]) -> list[str]:
    """The versions as a table, then the replicas."""
    from cluster.tables import render

    rows = []
    for entry in result["versions"]:
        agreement = entry["agreement"]
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["live_at"] or entry["deployed_at"]))
        overlap = "-" if agreement is None else f"{agreement['overlap']:.3f}"
        on_probation = entry["state"] == "live" and result["probation"]
        state = "live, on probation" if on_probation else entry["state"]
        rows.append([entry["version"], state, since, overlap])
    lines = render("", ["version", "state", "since", "overlap"], rows)
    lines += [f"{entry['version']}: {entry['path']}" for entry in result["versions"]]
    lines += [f"{entry['version']}: {entry['reason']}" for entry in result["versions"] if entry["reason"]]
    for replica in result["replicas"]:
        trouble = f"; {replica['error']}" if replica["error"] else ""
        loaded = ", ".join(replica["loaded"])
        lines.append(f"replica {replica['replica']}: answers with {replica['live']}, holds {loaded}{trouble}")
    return lines


def wait_for_signal() -> None:
    """Block until Ctrl-C, which is how a server is meant to end."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
