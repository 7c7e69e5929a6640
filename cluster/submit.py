"""`slimrank submit`: run a command as a job of a running Ray cluster, follow it, and end with its exit code.

What the job is given is made in cluster/job_command.py. Everything the job prints is followed live; under --json that
goes to stderr, and the job's JSON object alone to stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.job_command import Place, job_words, prints_json
from cluster.options import reporting
from cluster.output import emit
from trainer.errors import ConfigError, SlimrankError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

TOKEN_HELP = (
    "set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, "
    "or in ~/.ray/auth_token"
)
# A job is stopped as by Ctrl-C, which leaves a usable result, and has a minute for it; Ray's own are SIGTERM and 3 s.
STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
LOST_AFTER_S = 60.0  # without an answer from the cluster, the job is given up here; it may well go on there
STOPPED = 130  # the exit code of a stopped job: that of Ctrl-C


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--address",
    metavar="URL",
    help="The cluster's dashboard, http://HEAD:8265. By default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster of "
    "this machine.",
)
@click.option("--no-wait", is_flag=True, help="Print the job's id, and leave it to itself.")
@click.option("--name", help="Begins the job's id; the command's name by default.")
@click.option(
    "--env",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set in the job and its workers, and readable by all who may read the cluster's jobs.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@reporting
@click.pass_context
def submit(
    context: click.Context,
    address: str | None,
    no_wait: bool,
    name: str | None,
    env: tuple[str, ...],
    command: tuple[str, ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Run a command as a job of a running Ray cluster: slimrank submit -- tune --checkpoint ...

    The project's source tree travels with the job, without what .gitignore and .rayignore name. Relative paths are
    those of the current folder where the cluster's head reads this disk. Elsewhere only files of the source tree may
    be relative: give folders as absolute paths on storage that all nodes share, or as URIs.
    """
    root, upload = context.find_root(), source_tree()
    env_vars = {**STOP, **parse_env(env)}
    job_words(root, command, Place(Path.cwd(), upload, same_disk=True), as_json=as_json)  # mistakes show unconnected
    if not debug:
        quiet_job_client()
    client = connect(address)
    place = Place(Path.cwd(), upload, shares_disk(client))
    words = job_words(root, command, place, as_json=as_json)
    job = start(client, words, job_id(name, words[0]), upload, env_vars, same_disk=place.same_disk)
    if no_wait:
        emit({"job": job, "address": client.get_address()}, as_json, [job])
        click.echo(how_to_go_on(client, job), err=True)
    else:
        sys.exit(wait_for(client, job, prints_json(words)))


# -- what is sent ----------------------------------------------------------------------------------------------------


def source_tree() -> Path | None:
    """The folder that a job needs to run this code; None where slimrank is installed without its sources."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def parse_env(pairs: tuple[str, ...]) -> dict[str, str]:
    """Environment variables from KEY=VALUE. Raises: ConfigError for anything else; the value is not shown."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise ConfigError(
                f"--env {key}: not KEY=VALUE with a name of letters, digits and _: write --env {key}=VALUE"
            )
        found[key] = value
    return found


def job_id(name: str | None, command: str) -> str:
    """An id that no other job has. Raises: ConfigError for a name that does not fit into a URL."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ConfigError(f"--name {name}: letters, digits and _.- only, at most 100, a letter or digit first")
    return f"{name or command}-{secrets.token_hex(4)}"


def start(
    client: JobSubmissionClient,
    words: list[str],
    job: str,
    upload: Path | None,
    env_vars: dict[str, str],
    *,
    same_disk: bool,
) -> str:
    """Upload the source tree where the cluster lacks it, and start the job; returns its id.

    Raises: SlimrankError with the cluster's reason when it refuses.
    """
    program = sys.executable if same_disk else "python"  # a head elsewhere has its own
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if upload is not None:
        runtime_env["working_dir"] = str(upload)
    with cluster_errors(client.get_address()):
        return client.submit_job(
            entrypoint=shlex.join([program, "-m", "cluster", *words]), submission_id=job, runtime_env=runtime_env
        )


# -- the cluster -----------------------------------------------------------------------------------------------------


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises: ConfigError when nothing answers there, or the server wants a token that is missing or wrong.
    """
    if address is not None and address != "auto" and "://" not in address:
        raise ConfigError(f"--address {address}: not a URL: give the cluster's dashboard, such as http://{address}")
    from ray.job_submission import JobSubmissionClient

    variable = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(variable)
    if address is not None:
        os.environ[variable] = address  # Ray puts its environment above the argument; an option goes above both
    where = os.environ.get(variable) or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        with cluster_errors(where):
            return JobSubmissionClient()
    finally:
        if address is not None:
            os.environ.pop(variable)
            os.environ.update({} if before is None else {variable: before})


def quiet_job_client() -> None:
    """Keep what Ray's job client notes off the terminal: it sets the levels of its own loggers when it is imported."""
    import ray.job_submission  # noqa: F401

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def cluster_errors(where: str) -> Iterator[None]:
    """Ray's errors of the job server, as one line that names the next step.

    Raises: ConfigError where there is no server or no token, SlimrankError where the server refuses.
    """
    import requests
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        wrong = "403" in str(error) or "invalid" in str(error)
        raise ConfigError(f"{'the wrong' if wrong else 'no'} token for the cluster at {where}: {TOKEN_HELP}") from None
    except (ConnectionError, requests.RequestException, RayError) as error:
        raise ConfigError(
            f"no job server at {where}: {_line(error)}: check --address, and that the head runs"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise SlimrankError(f"the cluster at {where} refused: {_line(error)}") from None


def _line(error: Exception) -> str:
    """The first line of an error, or the last of a traceback that the server sent, without its full stop."""
    lines = [line for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1 if "Traceback" in str(error) else 0].strip().rstrip(".") if lines else type(error).__name__


def shares_disk(client: JobSubmissionClient) -> bool:
    """Whether the cluster's head reads this machine's disk: its session folder is here, and its host's name is ours.

    The address does not tell: a loopback one may be a forwarded port.
    """
    with cluster_errors(client.get_address()):
        nodes = client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
    heads = [node["raylet"] for node in nodes if node.get("raylet", {}).get("isHeadNode")]
    return any(h["nodeManagerHostname"] == socket.gethostname() and Path(h["sessionDir"]).is_dir() for h in heads)


# -- following -------------------------------------------------------------------------------------------------------


class LogLines:
    """A job's log on its way to the user, in chunks that may end anywhere.

    Under --json the log goes to stderr but for its last line that is an object, which goes to stdout in the end.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.taken = 0
        self.part = ""
        self.result = ""

    def show(self, chunk: str, start: int) -> None:
        """Print what is new of a chunk that begins at character `start` of the log."""
        new = chunk[max(self.taken - start, 0) :]
        self.taken += len(new)
        if not self.as_json:
            print(new, end="", flush=True)
            return
        *lines, self.part = (self.part + new).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        """Print what is left, and the result."""
        if self.part:
            self._line(self.part)
        if self.result:
            print(self.result, flush=True)
        self.part = self.result = ""

    def _line(self, line: str) -> None:
        if line.startswith("{") and line.endswith("}"):
            line, self.result = self.result, line
            if not line:
                return
        print(line, file=sys.stderr, flush=True)


def wait_for(client: JobSubmissionClient, job: str, as_json: bool) -> int:
    """Follow a job to its end; returns the exit code to end with.

    Ctrl-C asks whether to stop the job; where nobody can answer it goes on, and how to follow it is said.
    """
    log = LogLines(as_json)
    try:
        details = asyncio.run(follow(client, job, log))
    except KeyboardInterrupt:
        return interrupted(client, job, log)
    log.close()
    return exit_code(job, details)


async def follow(client: JobSubmissionClient, job: str, log: LogLines) -> JobDetails:
    """Show what `log` lacks of a job's log as it grows; returns how the job ended. A broken connection is made again.

    Raises: SlimrankError when the cluster has not answered for a minute, or no longer knows the job.
    """
    import aiohttp

    lost_at: float | None = None
    while True:
        seen = 0
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError):
            async for chunk in client.tail_job_logs(job):  # from the start, also after a break
                log.show(chunk, seen)
                seen += len(chunk)
        try:
            with cluster_errors(client.get_address()):
                details = client.get_job_info(job)
            lost_at = None
            if details.status.is_terminal():
                return details
        except ConfigError as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > LOST_AFTER_S:
                raise SlimrankError(f"job {job} may go on, but {error}: {how_to_go_on(client, job)}") from None
        await asyncio.sleep(1)


def exit_code(job: str, details: JobDetails) -> int:
    """The job's own exit code, 128 + the signal that ended it, 130 where it was stopped, else 1; says why on stderr."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        click.echo(f"job {job} was stopped", err=True)
        return STOPPED
    code = details.driver_exit_code
    if code is None:
        click.echo(f"error: job {job} failed: {details.message}", err=True)
        return 1
    return code if code >= 0 else 128 - code


def interrupted(client: JobSubmissionClient, job: str, log: LogLines) -> int:
    """After Ctrl-C: stop the job where the user says so, else leave it; returns the exit code to end with."""
    stop = False
    click.echo("", err=True)
    if sys.stdin.isatty():
        with contextlib.suppress(click.Abort):
            stop = click.confirm(f"stop job {job} too?", err=True)
    if not stop:
        click.echo(f"job {job} goes on: {how_to_go_on(client, job)}", err=True)
        return STOPPED
    with cluster_errors(client.get_address()):
        client.stop_job(job)
    click.echo("stopping it; what was finished is kept", err=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow(client, job, log))
        log.close()
    return STOPPED


def how_to_go_on(client: JobSubmissionClient, job: str) -> str:
    """The commands that follow and stop a job."""
    at = f"--address {client.get_address()}"
    return f"follow it with ray job logs --follow {at} {job}, stop it with ray job stop {at} {job}"
