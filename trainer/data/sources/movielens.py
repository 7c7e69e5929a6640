"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, from the package that carries it.

The ratings may be used for research and not be passed on, so they are fetched at run time and never committed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from trainer.errors import DataError
from trainer.files import new_directory

PACKAGE = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k"
ROWS = 100_000


def fetch_movielens_100k(out: Path) -> dict[str, object]:
    """Download the package with pip, join ratings with their users and films, write ratings.parquet into `out`.

    Columns: user_id, item_id, rating, timestamp (seconds), movie_title, release_year, genres (text cut by spaces), age,
    gender, occupation, zip_code.
    Raises: DataError when pip cannot get the package, or it holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="slimrank-fetch-") as scratch, new_directory(out) as staging:
        parts = {kind: _read(Path(scratch), kind) for kind in ("inter", "item", "user")}
        films = parts["item"].rename_columns({"class": "genres"})
        log = parts["inter"].join(films, "item_id").join(parts["user"], "user_id")
        if len(log) != ROWS:
            raise DataError(f"{PACKAGE}: {len(log)} ratings, expected {ROWS}: the package is not the one known")
        log = log.sort_by([("timestamp", "ascending"), ("user_id", "ascending"), ("item_id", "ascending")])
        pq.write_table(log, staging / "ratings.parquet")
    return {"path": str(Path(out).absolute() / "ratings.parquet"), "rows": len(log)}


def _read(scratch: Path, kind: str) -> pa.Table:
    """One of the package's tab-separated tables, its column names without their types."""
    name = f"{FOLDER}/ml-100k.{kind}"
    if not any(scratch.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise DataError(f"pip could not download {PACKAGE}: {reason}: check the connection to the package index")
    wheel = next(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
            table = pa_csv.read_csv(
                file, parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False, newlines_in_values=False)
            )
    except KeyError:
        raise DataError(f"{PACKAGE}: holds no {name}") from None
    return table.rename_columns([c.split(":")[0] for c in table.column_names])
