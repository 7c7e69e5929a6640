"""The command line of a submitted job: what the user wrote, checked here, with paths that hold where the job runs.

In: the words after `slimrank submit --`. Out: the words of the job. Nothing is sent from here: cluster/submit.py does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cluster.options import AS_WRITTEN
from trainer.errors import ConfigError

NOT_JOBS = {
    "submit": "a job submits no jobs: write the command itself after --",
    "demo": "it writes below its own folder, which a job loses: submit one step, such as tune",
}


@dataclass(frozen=True)
class Place:
    """Where a command was written, and what of that the job will see.

    `upload`: the folder that travels with the job; None where slimrank is installed on the cluster.
    `same_disk`: the cluster's head reads this machine's disk.
    """

    cwd: Path
    upload: Path | None
    same_disk: bool

    def resolve(self, option: str, value: str, *, reads_file: bool) -> str:
        """A path as the job must be given it. A job's own folder goes with the job, so no result may lie there.

        URIs and absolute paths are the cluster's own and stay. A relative path becomes absolute where the cluster reads
        this disk; elsewhere a file to read may be one that travels with the upload, and all else is refused.
        Raises: ConfigError naming the option, the path and what to write.
        """
        if "://" in value or os.path.isabs(value):
            return value
        here = Path(os.path.normpath(self.cwd / value))
        if self.same_disk:
            return str(here)
        if reads_file and self.upload is not None and here.is_relative_to(self.upload) and here.is_file():
            return here.relative_to(self.upload).as_posix()
        shared = "give an absolute path on storage that all nodes share, or a URI"
        if reads_file:
            raise ConfigError(
                f"{option} {value}: no file of {self.upload or 'an upload'}, which is all of this machine that the job "
                f"sees: copy it into that folder, or {shared}"
            )
        raise ConfigError(
            f"{option} {value} is relative: a job's own folder goes with the job, and the cluster does not read this "
            f"machine's disk: {shared}"
        )


def job_words(root: click.Context, words: Sequence[str], place: Place, *, as_json: bool) -> list[str]:
    """The words of a job from those the user wrote, each path as `place` has it; --json added where `as_json`.

    `root` is the context of the slimrank command itself.

    Raises: click.UsageError where the command would refuse the words, ConfigError for a path or a command
        that is not for jobs.
    """
    context, command, rest = root, root.command, list(words)
    root.meta[AS_WRITTEN] = True
    path: list[str] = []
    while isinstance(command, click.Group):
        if not rest:
            raise click.UsageError(f"{' '.join(path)} needs a subcommand", context)
        name, found, rest = command.resolve_command(context, rest)
        assert name is not None, "resolve_command raises a UsageError for a name it does not know"
        assert found is not None, "resolve_command raises a UsageError for a name it does not know"
        path.append(name)
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=name)
    if path[0] in NOT_JOBS:
        raise ConfigError(f"slimrank {path[0]} cannot be submitted: {NOT_JOBS[path[0]]}")
    return [*path, *_arguments(command, path[-1], rest, context, place, as_json)]


def _arguments(
    command: click.Command, name: str, rest: list[str], parent: click.Context, place: Place, as_json: bool
) -> list[str]:
    """Options and arguments of one command, written out again."""
    context = command.make_context(name, list(rest), parent=parent)
    raw, _, _ = command.make_parser(context).parse_args(list(rest))
    options, arguments = [], []
    for param in command.get_params(context):
        if param.name is None or context.get_parameter_source(param.name) is not ParameterSource.COMMANDLINE:
            continue
        if isinstance(param, click.Argument):
            arguments += [_value(param, v, place) for v in _listed(raw[param.name])]
        elif isinstance(param, click.Option) and param.is_flag:
            options.append(_flag(param, bool(raw[param.name])))
        else:
            options += [w for v in _listed(raw[param.name]) for w in (param.opts[-1], _value(param, v, place))]
    if as_json and not context.params.get("as_json"):
        options.append("--json")
    return [*options, "--", *arguments] if arguments else options


def _flag(option: click.Option, on: bool) -> str:
    return option.opts[-1] if on or not option.secondary_opts else option.secondary_opts[-1]


def _value(param: click.Parameter, value: Any, place: Place) -> str:
    if not isinstance(param.type, click.Path):
        return str(value)
    shown = param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
    return place.resolve(shown, str(value), reads_file=not param.type.dir_okay and param.name != "out")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def prints_json(words: Sequence[str]) -> bool:
    """Whether a job's last line of stdout is one JSON object."""
    return "--json" in words
