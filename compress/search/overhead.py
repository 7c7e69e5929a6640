"""Bytes of an artifact's files beside packed rows and ids, so that what a trial says of its size is what is written.

Found by writing the same files: those that no plan changes once, the dense part once for each plan of it; what a plan
adds to the manifest and to the file of id maps is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from safetensors.torch import save_file
from torch import nn

from compress.artifact import GOLDEN_ROWS, golden_rows
from compress.catalogue import write_catalogue
from compress.compressor import ResolvedTable
from compress.config import CompressionPlan
from compress.dense import WEIGHTS, DenseRuntime
from compress.ids import SCHEMA
from compress.score_reference import reference_of
from trainer.checkpoint import Checkpoint
from trainer.data.dataset import Dataset
from trainer.data.transform import write_arrow
from trainer.files import write_json

FILES = 8  # of an artifact that the manifest lists, each with a checksum
REFERENCE = reference_of(np.linspace(0.123456, 0.876543, 20_000))
CHECKSUM = {"bytes": 10**8, "sha256": "0" * 64}


def fixed_bytes(checkpoint: Checkpoint, dataset: Dataset) -> int:
    """Of the transform, the golden rows, the catalogue, and the manifest but for its plan, tables and other metrics."""
    transform, items = dataset.transform, dataset.items()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "transform.json", transform.describe())
        golden = dataset.sample().slice(0, GOLDEN_ROWS)
        scores = np.zeros((len(golden), len(transform.schema.tasks)), dtype=np.float32)
        write_arrow(golden_rows(golden, scores), folder / "golden.arrow")
        if items is not None:
            write_catalogue(folder / "items.arrow", items, transform)
        manifest = {
            "name": checkpoint.run.name,
            "run": checkpoint.run.model_dump(mode="json"),
            "sizes": dict.fromkeys(("table_bytes", "table_bytes_fp32", "artifact_bytes"), 10**8),
            "lineage": {"checkpoint": checkpoint.version, "fingerprint": checkpoint.fingerprint, "samples": 10**8},
            "metrics": {"score_reference": dict.fromkeys((t.name for t in transform.schema.tasks), REFERENCE)},
            "files": {f"{index:016}": CHECKSUM for index in range(FILES)},
        }
        write_json(folder / "manifest.json", manifest)
        return folder_bytes(folder)


def head_bytes(head: nn.Module | DenseRuntime) -> int:
    """Of the files of a dense part: as trained, or a runtime with its graph."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(head, DenseRuntime):
            head.save(folder)
        else:
            save_file({n: t.detach().contiguous() for n, t in head.state_dict().items()}, folder / WEIGHTS)
        return folder_bytes(folder)


def plan_bytes(plan: CompressionPlan, resolved: Mapping[str, ResolvedTable]) -> int:
    """Of the plan and the tables in the manifest, and of the file of id maps but for the packed ids."""
    own = {"plan": plan.model_dump(mode="json"), "tables": [asdict(part.stored) for part in resolved.values()]}
    rows = [
        {
            "table": name,
            "bits": 0,
            "loose": 0,
            "rows": [0] * (len(part.layout.cuts) + part.layout.count),
            "packed": b"",
        }
        for name, part in resolved.items()
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return len(json.dumps(own, indent=2)) + sink.tell()


def folder_bytes(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())
