"""What the files of an artifact must satisfy before the libraries that read them are let near, and after.

Headers are bounded and nothing may grow on reading: Arrow files hold no compressed or dictionary batches, no views and
no types that take no bytes; safetensors headers are short; a head is compared with its weights before it is allocated;
ids lie within their tables.

Legend: N rows of a table.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from compress.catalogue import Catalogue, ItemIds
from compress.dense import check_graph
from compress.errors import ArtifactError
from compress.ids import LooseIdMap
from compress.lookup import INT32_MAX, StoredTable
from compress.manifest import parse_json
from trainer.config import RunConfig
from trainer.data.schema import BagFeature
from trainer.data.transform import MISSING_ROW, OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, Transform, read_arrow
from trainer.models import build_head, lookups_of

TENSOR_HEADER_BYTES = 8 << 20
MOST_FEATURES = 4096
MOST_LAYERS = 64
MOST_LOOKUPS = 1 << 16
MOST_GOLDEN_ROWS = 4096
ARROW_MAGIC = b"ARROW1"
RECORD_BATCH = 3  # Message.header_type of Arrow's format/Message.fbs
Buffer = mmap.mmap | bytes
BLOCK_BYTES = 24  # Footer.recordBatches: offset int64, metadata length int32, padding, body length int64


def check_file(name: str, path: Path) -> None:
    """Check the frame of one file, by its kind. Raises: ArtifactError naming the file and the rule."""
    if name.endswith(".safetensors"):
        check_safetensors(path)
    elif name.endswith(".arrow"):
        check_arrow(path)
    elif name == "transform.json":
        check_transform(parse_json(path.read_bytes(), str(path)), str(path))
    elif name.endswith(".json"):
        parse_json(path.read_bytes(), str(path))
    elif name.endswith(".onnx"):
        check_graph(path.read_bytes())


def check_safetensors(path: Path) -> None:
    """Raises: ArtifactError when the header is longer than any head needs, or than the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(TENSOR_HEADER_BYTES, size - 8):
        raise ArtifactError(f"{path}: a header of {length:,} bytes in a file of {size:,}: not a safetensors file")


def check_transform(content: Any, where: str) -> None:
    """Raises: ArtifactError when a list of a transform is longer than any schema needs."""
    schema = content.get("schema") if isinstance(content, dict) else None
    features = schema.get("features") if isinstance(schema, dict) else None
    tables = content.get("tables") if isinstance(content, dict) else None
    for what, found in (("features", features), ("tables", tables)):
        if not isinstance(found, list) or len(found) > MOST_FEATURES:
            raise ArtifactError(f"{where}: {what}: not a list of at most {MOST_FEATURES}")


def check_run(run: Any, where: str) -> None:
    """The same of a manifest's run, before pydantic compares its features pairwise."""
    data, model = (run.get(k) if isinstance(run, dict) else None for k in ("data", "model"))
    features = data.get("features") if isinstance(data, dict) else None
    if not isinstance(features, list) or len(features) > MOST_FEATURES:
        raise ArtifactError(f"{where}: run.data.features: not a list of at most {MOST_FEATURES}")
    for key, value in model.items() if isinstance(model, dict) else ():
        if isinstance(value, list) and len(value) > MOST_LAYERS:
            raise ArtifactError(f"{where}: run.model.{key}: {len(value):,} layers, at most {MOST_LAYERS} may be")


def check_reference(manifest: Mapping[str, Any], tasks: Sequence[str], where: str) -> None:
    """Raises: ArtifactError when metrics.score_reference is of a task that the schema has not."""
    for task in manifest["metrics"].get("score_reference") or {}:
        if task not in tasks:
            raise ArtifactError(
                f"{where}: metrics.score_reference: no task {task[:80]!r}, they are: {', '.join(tasks)}"
            )


# -- Arrow -----------------------------------------------------------------------------------------------------------


def check_arrow(path: Path) -> None:
    """Raises: ArtifactError unless the file is plain: uncompressed batches side by side, types that take bytes.

    The footer is what Arrow's reader goes by; it and the head of each batch are read here as flatbuffers
    (Arrow's format/File.fbs and Message.fbs) before Arrow allocates anything for them.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_blocks(content, str(path))
        with pa.memory_map(str(path)) as source:
            columns = pa.ipc.open_file(source).schema
        for column in columns:
            if not is_plain(column.type):
                raise ArtifactError(f"{path}: column {column.name[:80]!r} is {str(column.type)[:80]}, not a plain type")
        if len(set(columns.names)) != len(columns):
            raise ArtifactError(f"{path}: a column is named twice")
        table = read_arrow(path)
        if table.nbytes > path.stat().st_size:
            raise ArtifactError(f"{path}: columns of {table.nbytes:,} bytes in a file of {path.stat().st_size:,}")
        table.validate(full=True)
    except (struct.error, OSError, ValueError, LookupError, RuntimeError, MemoryError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: not an Arrow file as slimrank writes it ({type(error).__name__})") from None


def _check_blocks(content: mmap.mmap, where: str) -> None:
    (length,) = struct.unpack_from("<i", content, len(content) - 10)
    start = len(content) - 10 - length
    if content[:6] != ARROW_MAGIC or content[-6:] != ARROW_MAGIC or not 8 <= start <= len(content) - 10:
        raise ArtifactError(f"{where}: not an Arrow file, or cut short")
    (root,) = struct.unpack_from("<I", content, start)
    if _vector(content, flatbuffer_field(content, start + root, 2))[1]:
        raise ArtifactError(f"{where}: holds dictionaries, which could grow without bound on reading")
    at, count = _vector(content, flatbuffer_field(content, start + root, 3))
    end = 8
    for index in range(count):
        offset, head, body = struct.unpack_from("<qi4xq", content, at + index * BLOCK_BYTES)
        if offset < end or head < 16 or body < 0 or offset + head + body > start:
            raise ArtifactError(f"{where}: batch {index} lies outside of the file, or over another")
        end = offset + head + body
        _check_batch(content, offset, where)


def _check_batch(content: mmap.mmap, offset: int, where: str) -> None:
    marker, _, root = struct.unpack_from("<IiI", content, offset)
    message = offset + 8 + root
    kind, header = flatbuffer_field(content, message, 1), flatbuffer_field(content, message, 2)
    if marker != 0xFFFFFFFF or kind is None or header is None or content[kind] != RECORD_BATCH:
        raise ArtifactError(f"{where}: holds something else than record batches")
    (target,) = struct.unpack_from("<I", content, header)
    if flatbuffer_field(content, header + target, 3) is not None:
        raise ArtifactError(f"{where}: holds a compressed batch, which could grow without bound on reading")


def flatbuffer_field(content: Buffer, table: int, index: int) -> int | None:
    """Where a field of a flatbuffers table lies, None when it is absent."""
    (back,) = struct.unpack_from("<i", content, table)
    vtable = table - back
    if vtable < 0:
        raise IndexError("a table before the file")
    (size,) = struct.unpack_from("<H", content, vtable)
    if 6 + 2 * index > size:
        return None
    (offset,) = struct.unpack_from("<H", content, vtable + 4 + 2 * index)
    return table + offset if offset else None


def _vector(content: Buffer, field: int | None) -> tuple[int, int]:
    """First byte and length of a flatbuffers vector; (0, 0) when it is absent."""
    if field is None:
        return 0, 0
    (target,) = struct.unpack_from("<I", content, field)
    (count,) = struct.unpack_from("<I", content, field + target)
    return field + target + 4, count


def is_plain(kind: pa.DataType) -> bool:
    """Types whose values take bytes of their own, so that rows are bounded by the file."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size > 0 and is_plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_plain(kind.value_type)
    texts = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    return kind in texts or (pa.types.is_primitive(kind) and kind.bit_width > 0) or pa.types.is_decimal(kind)


# -- what was read, against what it points into ----------------------------------------------------------------------


def check_tables_fit(infos: Mapping[str, TableInfo], manifest: Mapping[str, Any], where: str) -> None:
    """Raises: ArtifactError unless transform.json and the manifest speak of the same tables."""
    stored = {t["name"]: t for t in manifest["tables"]}
    if set(infos) != set(stored):
        raise ArtifactError(f"{where}: tables of the manifest are not those of transform.json")
    for name, info in infos.items():
        table = stored[name]
        rows, count = sum(tier["rows"] for tier in table["tiers"]), info.num_embeddings
        if type(count) is not int or not RESERVED_ROWS <= rows - table["centroids"] <= count <= INT32_MAX:
            raise ArtifactError(f"{where}: table {name}: {rows:,} rows of {str(count)[:20]}")
        if table["dim"] != info.embedding_dim or table["features"] != list(info.features):
            raise ArtifactError(f"{where}: table {name}: dim or features are not those of transform.json")


def check_ids(
    id_maps: Mapping[str, IdMap], infos: Mapping[str, TableInfo], rows: Mapping[str, int], where: str
) -> None:
    """Raises: ArtifactError when an id could read a row that its table has not; `rows` are the artifact's own."""
    if set(id_maps) != set(infos):
        raise ArtifactError(f"{where}: ids.arrow is not of these tables")
    for name, id_map in id_maps.items():
        count, remap = infos[name].num_embeddings, id_map.remap
        keyed = infos[name].kind == "vocabulary"
        if keyed != (id_map.keys is not None) or (id_map.keys is not None and len(id_map.keys) > count - RESERVED_ROWS):
            raise ArtifactError(f"{where}: table {name}: ids are not as many as transform.json says")
        far = id_map.far_rows if isinstance(id_map, LooseIdMap) else np.zeros(0, dtype=np.int32)
        known = count if id_map.keys is None else len(id_map.keys) + RESERVED_ROWS
        whole = count <= rows[name] if remap is None else len(remap) == known and _within(remap, rows[name])
        whole = whole and _within(far, rows[name])
        if not whole or id_map.row(OOV_ROW) >= rows[name] or id_map.row(MISSING_ROW) >= rows[name]:
            raise ArtifactError(f"{where}: table {name}: an id reads a row that the table has not")


def _within(values: np.ndarray, rows: int) -> bool:
    return not len(values) or bool(values.min() >= 0 and values.max() < rows)


def check_catalogue(catalogue: Catalogue, transform: Transform, rows: Mapping[str, int], where: str) -> None:
    """Raises: ArtifactError unless every item's features are whole and lie within their tables."""
    count = len(catalogue)
    keys = catalogue.keys
    if keys.dtype != np.uint64 or (keys[1:] < keys[:-1]).any():
        raise ArtifactError(f"{where}: keys are not sorted 64-bit hashes")
    for column in catalogue.dense:
        if column.dtype != np.float32 or not np.isfinite(column).all():
            raise ArtifactError(f"{where}: dense columns are not finite fp32")
    for name, ids in catalogue.sparse.items():
        _check_item_ids(ids, transform, name, count, where)
        if not _within(ids.values, rows[transform.table_of(name).name]):
            raise ArtifactError(f"{where}: feature {name}: an item reads a row that the table has not")


def _check_item_ids(ids: ItemIds, transform: Transform, name: str, count: int, where: str) -> None:
    bags = isinstance(transform.sparse[name], BagFeature)
    if ids.values.dtype.kind not in "iu" or bags != (ids.offsets is not None) or len(ids) != count:
        raise ArtifactError(f"{where}: feature {name}: not {'bags' if bags else 'rows'} of {count:,} items")
    if ids.offsets is None:
        return
    offsets, total = ids.offsets, len(ids.values)
    whole = offsets.dtype == np.int32 and offsets[0] >= 0 and offsets[-1] <= total and (np.diff(offsets) >= 0).all()
    weighed = ids.weights is None or (ids.weights.dtype == np.float32 and len(ids.weights) == total)
    if not whole or not weighed or transform.weighted != (ids.weights is not None):
        raise ArtifactError(f"{where}: feature {name}: bags are not those of {count:,} items")


def check_head(run: RunConfig, transform: Transform, shapes: Mapping[str, Sequence[int]] | None, where: str) -> None:
    """Raises: ArtifactError unless a head's weights, by name and shape, are those stored. Allocates none of them.

    Without `shapes` only the number of lookups is checked.
    """
    lookups = len(lookups_of(transform, list(transform.sparse)))
    if lookups > MOST_LOOKUPS:
        raise ArtifactError(f"{where}: {lookups:,} lookups a row, at most {MOST_LOOKUPS:,} may be")
    if shapes is None:
        return
    with torch.device("meta"):
        wanted = {key: list(value.shape) for key, value in build_head(run.model, transform).state_dict().items()}
    found = {key: list(shape) for key, shape in shapes.items()}
    if wanted != found:
        wrong = next(k for k in [*wanted, *found] if wanted.get(k) != found.get(k))
        raise ArtifactError(f"{where}: {wrong[:80]} is {found.get(wrong)}, the run's head has {wanted.get(wrong)}")


def check_decoders(decoders: Mapping[str, torch.Tensor], tables: Sequence[StoredTable], where: str) -> None:
    """Raises: ArtifactError unless each table of narrow rows, and no other, has a matrix that widens them."""
    wanted = {t.name: (t.width, t.dim) for t in tables if t.width < t.dim}
    found = {name: tuple(value.shape) for name, value in decoders.items()}
    if wanted != found or any(value.dtype != torch.float32 for value in decoders.values()):
        raise ArtifactError(f"{where}: decoders of {sorted(found)[:5]}, the tables need {sorted(wanted)[:5]}")


def read_golden(path: Path, tasks: int) -> pa.Table:
    """The golden rows. Raises: ArtifactError when they are none, too many, or lack a score a task."""
    table = read_arrow(path)
    if not 0 < len(table) <= MOST_GOLDEN_ROWS or "_expected" not in table.column_names:
        raise ArtifactError(f"{path}: {len(table):,} golden rows, 1 to {MOST_GOLDEN_ROWS:,} may be")
    if table["_expected"].type != pa.list_(pa.float32(), tasks):
        raise ArtifactError(f"{path}: golden scores are {table['_expected'].type}, {tasks} fp32 a row are expected")
    return table
