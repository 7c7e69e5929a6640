"""trainer/data/sources: the synthetic log and its known ceiling, and the real one read from its package's files."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from trainer.config import load_run
from trainer.data.log import find_files, fragments_of
from trainer.data.sources import movielens, synthetic
from trainer.data.sources.synthetic import CRITEO_SIZES, make_chunk, mix, write_synthetic, zipf_ranks
from trainer.errors import DataError, SlimrankError


def quiet(what: str, step: int, total: int) -> None:
    """Progress that is not shown."""


def read_log(folder) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in sorted((folder / "raw").iterdir())])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 400)


@pytest.mark.usefixtures("small_chunks")
def test_synthetic_log_is_of_its_seed(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        write_synthetic(tmp_path / name, 500, seed=seed, max_ids=50, progress=quiet)
    logs = [read_log(tmp_path / n) for n in "abc"]
    assert logs[0].equals(logs[1])
    assert not logs[0].equals(logs[2])
    assert (tmp_path / "a" / "synthetic.json").read_text() == (tmp_path / "b" / "synthetic.json").read_text()


@pytest.mark.usefixtures("small_chunks")
def test_synthetic_log_has_the_rows_and_columns_asked_for(tmp_path):
    told = write_synthetic(tmp_path / "out", 1001, progress=quiet)
    parts = sorted((tmp_path / "out" / "raw").iterdir())
    assert [pq.ParquetFile(p).metadata.num_rows for p in parts] == [400, 400, 201]
    table = read_log(tmp_path / "out")
    assert table.column_names == ["label", *[f"I{i}" for i in range(1, 14)], *[f"C{i}" for i in range(1, 27)]]
    assert told["rows"] == 1001
    assert told["test_rows"] == 100
    assert [table[f"I{i}"].null_count > 0 for i in (1, 2, 3, 4)] == [False, True, True, True]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("max_ids", [1, 20, None])
def test_synthetic_ids_are_bounded(tmp_path, max_ids):
    told = write_synthetic(tmp_path / "out", 800, max_ids=max_ids, progress=quiet)
    table = read_log(tmp_path / "out")
    for field, size in enumerate(CRITEO_SIZES, start=1):
        bound = size if max_ids is None else min(size, max_ids)
        assert told["ids"][f"C{field}"] == bound
        assert len(table[f"C{field}"].unique()) <= bound
    if max_ids == 20:
        assert len(table["C1"].unique()) > 10


def test_synthetic_ceiling_is_the_auc_of_the_true_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 7000)
    told = write_synthetic(tmp_path / "out", 20_000, seed=5, max_ids=1000, progress=quiet)
    sizes = tuple(told["ids"].values())
    chunks = [make_chunk(np.random.default_rng((5, i)), n, sizes) for i, n in enumerate([7000, 7000, 6000])]
    labels = np.concatenate([t["label"].to_numpy() for t, _ in chunks])
    rates = 1 / (1 + np.exp(-np.concatenate([odds for _, odds in chunks])))
    assert read_log(tmp_path / "out")["label"].to_numpy().tolist() == labels.tolist()
    assert told["attainable_auc"] == pytest.approx(roc_auc_score(labels[-2000:], rates[-2000:]), abs=1e-9)
    assert told["attainable_log_loss"] == pytest.approx(log_loss(labels[-2000:], rates[-2000:]), abs=1e-9)
    assert told["attainable_auc"] > 0.6
    assert labels.mean() == pytest.approx(rates.mean(), abs=0.01), "labels are drawn at their rates"
    known = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert known == {k: v for k, v in told.items() if k != "path"}


@pytest.mark.usefixtures("small_chunks")
def test_synthetic_run_loads_and_fits_the_log(tmp_path):
    write_synthetic(tmp_path / "out", 900, progress=quiet)
    data = load_run(tmp_path / "out" / "run.yaml").data
    assert sum(f.rows for f in fragments_of(find_files(data), data)) == 900


def test_synthetic_log_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(SlimrankError, match="not empty"):
        write_synthetic(tmp_path, 10, progress=quiet)


@pytest.mark.usefixtures("small_chunks")
def test_synthetic_progress_counts_rows(tmp_path):
    told = []
    write_synthetic(tmp_path / "out", 900, progress=lambda *step: told.append(step))
    assert told == [("synth", 400, 900), ("synth", 800, 900), ("synth", 900, 900)]


def test_mix_is_splitmix64():
    # the first outputs of the reference generator seeded with 0 are mix(0) at salts 0, 1, 2
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(mix(np.zeros(1, np.uint64), salt)[0]) for salt in range(3)] == expected


def test_zipf_ranks_are_bounded_and_skewed():
    ranks = zipf_ranks(np.random.default_rng(0), 20_000, 1000)
    assert ranks.min() == 0
    assert ranks.max() <= 999
    counts = np.bincount(ranks, minlength=1000)
    assert counts[0] > 1.5 * counts[1] > 2 * counts[4]
    assert zipf_ranks(np.random.default_rng(0), 100, 1).max() == 0


# -- MovieLens, from a package made here -----------------------------------------------------------------------------


def write_package(folder, files: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{movielens.FOLDER}/{name}", text)


def test_movielens_tables_are_read_without_types_and_quotes(tmp_path):
    write_package(
        tmp_path, {"ml-100k.item": 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n7\tSaid "Go" 5\tDrama War\n'}
    )
    table = movielens._read(tmp_path, "item")
    assert table.to_pylist() == [{"item_id": 7, "movie_title": 'Said "Go" 5', "class": "Drama War"}]


def test_movielens_package_that_lacks_a_table_is_refused(tmp_path):
    write_package(tmp_path, {})
    with pytest.raises(DataError, match=r"recbole==1.2.1: holds no .*ml-100k\.user"):
        movielens._read(tmp_path, "user")
