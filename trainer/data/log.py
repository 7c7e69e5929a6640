"""A raw log on disk -> fragments that workers read on their own.

In: the globs of the data section. Out: Fragment values (a file, some row groups, the number of their first row in the
log) and Arrow tables of the wanted columns. CSV is first rewritten as Parquet, so that the rest knows one format.
"""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from trainer.data.schema import DataConfig, NumericFeature, columns_of
from trainer.errors import DataError

FRAGMENT_ROWS = 500_000
CSV_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Fragment:
    """Some row groups of one Parquet file. `start` counts rows from the first row of the log."""

    index: int
    path: str
    row_groups: tuple[int, ...]
    start: int
    rows: int
    split: str | None = None

    def read(self, columns: Sequence[str]) -> pa.Table:
        """The wanted columns of these rows. Raises: DataError when the file is damaged."""
        try:
            with pq.ParquetFile(self.path) as file:
                return file.read_row_groups(list(self.row_groups), columns=list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.path}: cannot be read: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class LogFile:
    """One file of the log, and the split it belongs to where files decide that."""

    path: str
    split: str | None
    is_csv: bool
    origin: str  # what the user knows it as: the CSV file, where `path` is its Parquet copy


def find_files(data: DataConfig) -> list[LogFile]:
    """Expand the globs of `input` or `split.files`, in name order.

    Raises: DataError when a glob matches nothing or a file's format cannot be told.
    """
    patterns: list[tuple[str, str | None]] = (
        [(p, s) for s, p in data.split.files.items()] if data.split.files else [(str(data.input), None)]
    )
    files = []
    for pattern, split in patterns:
        paths = sorted(glob.glob(pattern, recursive=True))
        if len(paths) == 1 and Path(paths[0]).is_dir():
            paths = sorted(str(p) for p in Path(paths[0]).iterdir() if not p.name.startswith((".", "_")))
        paths = [p for p in paths if Path(p).is_file()]
        if not paths:
            raise DataError(f"{pattern}: no file matches: correct data.input, or pass --input")
        files += [LogFile(path, split, _is_csv(path, data), path) for path in paths]
    return files


def _is_csv(path: str, data: DataConfig) -> bool:
    if data.format is not None:
        return data.format == "csv"
    suffixes = {s.lower() for s in Path(path).suffixes}
    if ".parquet" in suffixes or ".pq" in suffixes:
        return False
    if suffixes & {".csv", ".tsv", ".txt"}:
        return True
    raise DataError(f"{path}: cannot tell its format from its name: set data.format to parquet or csv")


def fragments_of(files: Sequence[LogFile], data: DataConfig) -> list[Fragment]:
    """Cut Parquet files into fragments of about FRAGMENT_ROWS rows, reading only their footers.

    Raises: DataError when a file is not Parquet, or lacks a column the schema names.
    """
    fragments: list[Fragment] = []
    start = 0
    for file in files:
        try:
            footer = pq.ParquetFile(file.path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file.path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
        with footer:
            check_columns(file.path, footer.schema_arrow.names, data)
            groups: list[int] = []
            rows = 0
            sizes = [footer.metadata.row_group(g).num_rows for g in range(footer.metadata.num_row_groups)]
            for group, size in enumerate(sizes):
                groups.append(group)
                rows += size
                if rows and (rows >= FRAGMENT_ROWS or group == len(sizes) - 1):
                    fragments.append(Fragment(len(fragments), file.path, tuple(groups), start, rows, file.split))
                    start += rows
                    groups, rows = [], 0
    if not fragments:
        raise DataError(f"{files[0].origin}: the log has no rows")
    return fragments


def check_log(data: DataConfig) -> None:
    """Look at every file's header or footer, so that a mistake shows before any work starts.

    Raises: DataError as `find_files` and `fragments_of` do.
    """
    files = find_files(data)
    for file in files:
        if file.is_csv:
            check_columns(file.path, csv_header(file.path, data), data)
    parquet = [f for f in files if not f.is_csv]
    if parquet:
        fragments_of(parquet, data)


def csv_header(path: str, data: DataConfig) -> list[str]:
    """The column names in a CSV file's first line. Raises: DataError when it has none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            names = next(csv.reader(file, delimiter=data.delimiter), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from None
    if not names:
        raise DataError(f"{path}: cannot be read as CSV: the file is empty: its first line must name the columns")
    return names


def check_columns(path: str, present: Sequence[str], data: DataConfig) -> None:
    """Raises: DataError naming the first column that the schema wants and the log lacks, and who wants it."""
    for column in data.columns:
        if column not in present:
            users = [f"feature {f.name!r}" for f in data.features if column in columns_of(f)]
            users += [f"task {t.name!r}" for t in data.tasks if t.column == column]
            users += ["data.clean"] if column in data.clean.columns else []
            listed = ", ".join(present[:30]) + (", ..." if len(present) > 30 else "")
            raise DataError(
                f"column {column!r} ({users[0] if users else 'data section'}) is not in {path}, which has: {listed}; "
                f"correct the schema or the log"
            )


def csv_to_parquet(source: str, target: str, data: DataConfig) -> None:
    """Stream a CSV file (header in its first line) into Parquet row groups; ids as text, numbers as float64.

    Raises: DataError naming the file and what in it could not be read.
    """
    numeric = {f.source for f in data.features if isinstance(f, NumericFeature)} | {t.column for t in data.tasks}
    types = {c: pa.float64() if c in numeric else pa.string() for c in data.columns}
    header = csv_header(source, data)
    check_columns(source, header, data)
    try:
        reader = pa_csv.open_csv(
            source,
            read_options=pa_csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(delimiter=data.delimiter),
            convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=data.columns),
        )
        with pq.ParquetWriter(target, reader.schema) as writer:
            for block in reader:
                writer.write_batch(block)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        reason = re.sub(r"CSV column #(\d+)", lambda m: f"column {header[int(m[1])]!r}", str(error).splitlines()[0])
        raise DataError(f"{source}: cannot be read as CSV: {reason}") from None
