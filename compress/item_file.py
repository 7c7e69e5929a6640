"""A catalogue that lies beside its artifact: made from raw item rows, checked, and put in place of the artifact's own.

In: an artifact and a Parquet file of items. Out: an Arrow file as the artifact's items.arrow is, which holds rows of
that artifact's tables and so belongs to it alone; its schema metadata names the artifact's version.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from compress.artifact import UNREADABLE, Artifact, load_artifact
from compress.catalogue import VERSION_KEY, Catalogue, read_catalogue, write_catalogue
from compress.checks import check_arrow, check_catalogue
from compress.errors import ArtifactError
from compress.manifest import stored_tables
from compress.verified import checksum
from trainer.data.schema import DataConfig, columns_of
from trainer.data.transform import as_text, flat, read_arrow
from trainer.errors import DataError
from trainer.files import new_file
from trainer.storage import Location


def build_catalogue(folder: str | Location, items: Path, out: Path) -> dict[str, Any]:
    """Encode the raw items of a Parquet file for an artifact; what `slimrank catalogue build --json` prints.

    Raises: DataError when the file lacks a column, an id or holds one twice; ArtifactError as `load_artifact` does.
    """
    artifact = load_artifact(folder)
    transform = artifact.model.transform
    raw = read_items(items, transform.schema, artifact)
    version = artifact.model.version
    with new_file(out) as staging:
        write_catalogue(staging, raw, transform, version)
        found = open_catalogue(artifact, staging)  # what is written here is what a server would take
    named = with_catalogue(artifact, out)
    size = out.stat().st_size
    return {"catalogue": str(out.absolute()), "items": len(found), "bytes": size, "version": named.version}


def read_items(path: Path, schema: DataConfig, artifact: Artifact) -> pa.Table:
    """The item-side columns of a Parquet file. Raises: DataError naming the column, the id and the rule."""
    if schema.ids.item is None:
        raise DataError(f"{artifact.folder}: its schema names no item id: set data.ids.item, prepare and train again")
    wanted = [schema.ids.item, *([schema.title] if schema.title else [])]
    wanted += [c for f in schema.features if f.side == "item" for c in columns_of(f)]
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            absent = [c for c in wanted if c not in present]
            if absent:
                raise DataError(f"{path}: has no column {absent[0]!r}, which the artifact's items have: add it")
            raw = file.read(columns=list(dict.fromkeys(wanted)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    _check_item_column(as_text(flat(raw[schema.ids.item]), schema.ids.item), path, schema.ids.item)
    return raw


def _check_item_column(ids: pa.Array, path: Path, name: str) -> None:
    if ids.null_count:
        row = pc.index(ids.is_null(), True).as_py()
        raise DataError(f"{path}: row {row} has no {name!r}: every item needs an id")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        again = twice.field("values")[0].as_py()
        raise DataError(f"{path}: item {again!r} stands there {twice.field('counts')[0]} times: give each item one row")


def with_catalogue(artifact: Artifact, path: Path) -> Artifact:
    """The artifact with another catalogue; its version then names both.

    Raises: ArtifactError when the file is damaged, is no catalogue, or was made for another artifact.
    """
    digest = checksum(Path(path), full=False)
    return replace(artifact, catalogue=open_catalogue(artifact, Path(path)), catalogue_digest=digest)


def open_catalogue(artifact: Artifact, path: Path) -> Catalogue:
    """Map a catalogue file and check it as an artifact's own is checked. Raises: ArtifactError as above."""
    transform = artifact.model.transform
    try:
        check_arrow(path)
        made_for = (read_arrow(path).schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")[:80]
        if made_for != artifact.model.version:
            raise ArtifactError(
                f"{path}: made for artifact {made_for or 'unknown'}, not for {artifact.model.version}, whose rows it "
                f"must name: run 'slimrank catalogue build' with that artifact"
            )
        catalogue = read_catalogue(path, transform)
        rows = {t.name: t.rows for t in stored_tables(artifact.manifest)}
        check_catalogue(catalogue, transform, rows, str(path))
    except ArtifactError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:300]
        raise ArtifactError(f"{path}: not a catalogue: {type(error).__name__}: {reason}") from None
    return catalogue
