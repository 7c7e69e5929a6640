"""`slimrank plan` without prepared data counts the log's ids as prepare does, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.topology import Tables, dry_run, find_tables, parse_topology, tables_of_dataset
from trainer.config import load_run
from trainer.data.dataset import open_dataset
from trainer.data.prepare import fit_tables, prepare
from trainer.data.sources.synthetic import write_synthetic


@pytest.mark.usefixtures("ray_local")
def test_counted_tables_are_the_prepared_ones(tmp_path: Path) -> None:
    def quietly(*_: object) -> None:
        """Progress that nobody watches."""

    write_synthetic(tmp_path / "log", 3000, max_ids=50, progress=quietly)
    run = load_run(tmp_path / "log" / "run.yaml")
    before = sorted(tmp_path.rglob("*"))
    assert find_tables(run, None, {}) is None, "vocabularies must be counted"
    counted = fit_tables(run, quietly)
    assert sorted(tmp_path.rglob("*")) == before
    prepare(run, tmp_path / "prepared", quietly)
    known = tables_of_dataset(open_dataset(tmp_path / "prepared"))
    assert counted.tables == known.tables
    assert known.ids_per_row is not None
    assert set(known.ids_per_row.values()) == {1.0}, "each field of this log is one id a row"
    result = dry_run(run, Tables(counted.tables), parse_topology("1x2xCPU-8GB"))
    assert set(result["tables"]) == set(known.tables)
