"""`slimrank compress`, `methods` and `tune`: a checkpoint becomes an artifact. Each parses, calls, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import FILE, FOLDER, PLACE, common
from cluster.output import Progress, emit
from trainer.progress import size

if TYPE_CHECKING:  # pyarrow is a third of a second that --help has not
    from trainer.storage import Location


@click.command()
@click.option("--checkpoint", type=PLACE, required=True, help="A checkpoint, or a training run's folder.")
@click.option("--data", "data_dir", type=PLACE, required=True, help="What the checkpoint was trained on.")
@click.option(
    "--plan", "plan_file", type=FILE, help="What to do to each table; the run's compress section by default, else INT8."
)
@click.option(
    "--budget",
    help='In place of a plan: the bytes that the tables may take, as "2%" of fp32 or "300MB"; makes the plan.',
)
@click.option(
    "--max-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="With --budget: the most that 500 candidates may take by the cost model of this machine.",
)
@click.option(
    "--split", type=click.Choice(["val", "test"]), default="test", show_default=True, help="Where to compare."
)
@click.option("--out", type=PLACE, required=True, help="Folder or URI to write the artifact to.")
@common
def compress(
    checkpoint: Location,
    data_dir: Location,
    plan_file: Path | None,
    budget: str | None,
    max_ms: float | None,
    split: Any,
    out: Location,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Checkpoint + plan, or a byte budget -> artifact, compared with the checkpoint it came from."""
    from cluster.tables import losses_table
    from compress.pipeline import compress_checkpoint
    from trainer.results import moved, results_at

    with results_at(out) as folder:
        result = compress_checkpoint(checkpoint, data_dir, plan_file, folder, split, Progress().step, budget, max_ms)
        result = moved(result, folder, out)
    lines = [result["artifact"], *size_lines(result), f"delta AUC {result['delta_auc']:+.5f}"]
    emit(result, as_json, [*lines, *losses_table(result["by_table"])] if "by_table" in result else lines)


@click.command()
@click.option("--checkpoint", type=PLACE, required=True, help="A checkpoint, or a training run's folder.")
@click.option("--data", "data_dir", type=PLACE, required=True, help="What the checkpoint was trained on.")
@click.option(
    "--split", type=click.Choice(["val", "test"]), default="test", show_default=True, help="Where to compare."
)
@click.option(
    "--rows", type=click.IntRange(min=1000), default=100_000, show_default=True, help="Rows of it to score at most."
)
@click.option("--out", type=FILE, help="Markdown file to write the whole table to.")
@common
def methods(
    checkpoint: Location,
    data_dir: Location,
    split: Any,
    rows: int,
    out: Path | None,
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Each way of compressing tables on its own, the best together, and other people's: size, time, quality."""
    from cluster.tables import methods_lines, methods_markdown
    from compress.pipeline import compare_methods

    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"{out.parent} is no folder: make it first", param_hint="--out")
    result = compare_methods(checkpoint, data_dir, Progress().step, split, rows)
    if out is not None:
        out.write_text(methods_markdown(result), encoding="utf-8")
    emit(result, as_json, methods_lines(result))


@click.command()
@click.option("--checkpoint", type=PLACE, required=True, help="A checkpoint, or a training run's folder.")
@click.option("--data", "data_dir", type=PLACE, required=True, help="What the checkpoint was trained on.")
@click.option(
    "--max-delta-ne", type=click.FloatRange(min=0, min_open=True), help="Budget; .001 is a tenth of a percent."
)
@click.option("--max-bytes", metavar="BYTES", help='Most that the tables may take, as "2%" of fp32 or "300MB".')
@click.option(
    "--max-ms", type=click.FloatRange(min=0, min_open=True), help="Most that 500 candidates may take, on one thread."
)
@click.option("--trials", type=click.IntRange(min=1), help="Plans to try; 48 by default.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="End the trials after so long.")
@click.option(
    "--algorithm", type=click.Choice(["tpe", "nsga2", "random", "grid"]), help="What draws the plans; tpe by default."
)
@click.option("--earlier", type=FOLDER, metavar="SEARCH", help="Another search's folder: its front is tried first.")
@click.option("--resume", is_flag=True, help="Go on with the search in --out.")
@click.option("--out", type=PLACE, required=True, help="Folder or URI for trials, front and artifact.")
@common
def tune(
    checkpoint: Any,
    data_dir: Any,
    max_delta_ne: float | None,
    max_bytes: str | None,
    max_ms: float | None,
    trials: int | None,
    minutes: float | None,
    algorithm: str | None,
    earlier: Path | None,
    resume: bool,
    out: Location,
    as_json: bool,
    address: str | None,
    debug: bool,
) -> None:
    """Search with Ray Tune for the smallest artifact that holds the NE budget."""
    from cluster.runs import search_config
    from cluster.session import ray_session
    from cluster.tables import front_table
    from trainer.results import SYNC_S, moved, results_at

    asked = {"max_delta_ne": max_delta_ne, "max_table_bytes": max_bytes, "max_ms": max_ms}
    search = search_config(checkpoint, asked | {"trials": trials, "minutes": minutes, "algorithm": algorithm})
    with results_at(out, resume=resume, every_s=SYNC_S) as folder, ray_session(address, debug=debug):
        from compress.search.tune import tune as run_search

        result = run_search(
            checkpoint, data_dir, folder, search, resume=resume, progress=Progress().step, earlier=earlier
        )
        result = moved(result, folder, out)
    emit(result, as_json, front_table(result))


def size_lines(result: dict[str, Any]) -> list[str]:
    """Sizes of an artifact, and what they cost in NE."""
    share = result["table_bytes"] / result["table_bytes_fp32"]
    return [
        f"tables {size(result['table_bytes'])} of {size(result['table_bytes_fp32'])} in fp32 ({share:.1%}), "
        f"whole artifact {size(result['artifact_bytes'])}",
        f"delta NE {result['delta_ne']:+.5%} (95% bound {result['delta_ne_upper']:+.5%})",
    ]
