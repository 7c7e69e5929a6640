"""Checkpoint, prepared data and results on a real S3 server (moto, on loopback)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

sys.path[:0] = [str(Path(__file__).parents[1] / "compress")]

from compress_builders import World, build_world, mixed_plan  # noqa: E402

from cluster.cli import main  # noqa: E402
from trainer.checkpoint import READ_ROWS, _commit, open_checkpoint, write_tensors  # noqa: E402
from trainer.data.dataset import open_dataset  # noqa: E402
from trainer.errors import DataError, StorageError  # noqa: E402
from trainer.results import Mirror  # noqa: E402
from trainer.storage import IN_FLIGHT, PIECE_BYTES, RemotePath, location  # noqa: E402

TABLE_ROWS, DIM, PARTS = 3_200_000, 16, 32  # 205 MB of fp32
CHUNK_MB = READ_ROWS * DIM * 4 / 2**20
WORKING_MB = IN_FLIGHT * PIECE_BYTES / 2**20 + 32  # requests in flight, and what libraries allocate at first use


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The query of a URI that reaches a server of our own with a bucket 'slim'; credentials are in the environment."""
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "Running on" in line)
        port = line.rsplit(":", 1)[1].strip().split()[0]
        query = f"?scheme=http&endpoint_override=127.0.0.1%3A{port}"
        made = location(f"s3://slim{query}&allow_bucket_creation=true")
        assert isinstance(made, RemotePath)
        made.filesystem.create_dir("slim")
        # the server says a line a request: a pipe that nobody reads would stop it
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield query
    finally:
        server.terminate()
        server.wait(10)
        patch.undo()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uris(bucket: str, world: World) -> dict[str, str]:
    """The world's checkpoint and data, uploaded."""
    found = {}
    for name, folder in (("checkpoint", world.checkpoint.folder), ("data", world.dataset.folder)):
        found[name] = f"s3://slim/{name}{bucket}"
        place = location(found[name])
        assert isinstance(place, RemotePath)
        assert isinstance(folder, Path)
        Mirror(folder, place).sync()
    return found


def slimrank(*words: str) -> dict[str, Any]:
    """Run the command in this process; what it prints as JSON."""
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_a_checkpoint_over_s3_is_the_local_one_to_the_bit(world: World, uris: dict[str, str]) -> None:
    here, there = world.checkpoint, open_checkpoint(uris["checkpoint"])
    assert there.keys() == here.keys()
    assert all(torch.equal(there.read(key), here.read(key)) for key in here.keys())  # noqa: SIM118
    rng = np.random.default_rng(0)
    for name in world.dataset.transform.tables:
        total = here.shape(f"tables/{name}/weight")[0]
        rows = np.unique(rng.integers(0, total, 60))
        assert torch.equal(there.table_rows(name, rows), here.table_rows(name, rows))
        assert torch.equal(
            torch.cat([c for _, c in there.table_chunks(name)]), torch.cat([c for _, c in here.table_chunks(name)])
        )
    assert there.version == here.version


def test_compress_works_with_everything_on_s3(world: World, uris: dict[str, str], bucket: str, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", f"s3://slim/artifact{bucket}"
    plan.write_text(mixed_plan().model_dump_json())
    words = ["--checkpoint", uris["checkpoint"], "--data", uris["data"], "--plan", str(plan)]
    result = slimrank("compress", *words, "--out", out)
    local = slimrank(
        "compress", "--checkpoint", str(world.checkpoint.folder), "--data", str(world.dataset.folder),
        "--plan", str(plan), "--out", str(tmp_path / "artifact"),
    )  # fmt: skip
    assert result["artifact"] == out
    assert result["version"] == local["version"], "the same artifact to the byte"
    assert result["delta_ne"] == local["delta_ne"]
    shown = slimrank("artifact", "show", out)
    assert (shown["artifact"], shown["version"]) == (out, local["version"])
    assert slimrank("artifact", "verify", out)["ok"]
    scored = slimrank("evaluate", "--model", out, "--data", uris["data"])
    assert scored == slimrank("evaluate", "--model", str(tmp_path / "artifact"), "--data", str(world.dataset.folder))
    again = CliRunner().invoke(main, ["compress", *words, "--out", out])
    assert again.exit_code == 2
    assert "not empty" in again.stderr


def test_an_altered_artifact_on_s3_is_refused(uris: dict[str, str], bucket: str, tmp_path: Path) -> None:
    words = ["--checkpoint", uris["checkpoint"], "--data", uris["data"], "--budget", "60%"]
    slimrank("compress", *words, "--out", str(tmp_path / "a"))
    tables = bytearray((tmp_path / "a" / "tables.bin").read_bytes())
    tables[7] ^= 1
    (tmp_path / "a" / "tables.bin").write_bytes(tables)
    place = location(f"s3://slim/altered{bucket}")
    assert isinstance(place, RemotePath)
    Mirror(tmp_path / "a", place).sync()
    refused = CliRunner().invoke(main, ["evaluate", "--model", str(place), "--data", uris["data"]])
    assert refused.exit_code == 2
    assert "slim/altered/tables.bin" in refused.stderr
    assert "altered or cut short" in refused.stderr


@pytest.mark.parametrize(
    ("uri", "words"), [("s3://none/run", "no bucket 'none'"), ("s3://slim/nothing", "nothing is there")]
)
def test_what_is_not_there_is_said_in_one_line(bucket: str, uri: str, words: str) -> None:
    for command in (["checkpoint", "show"], ["artifact", "show"]):
        refused = CliRunner().invoke(main, [*command, uri + bucket])
        assert refused.exit_code == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        assert words in refused.stderr
        assert uri in refused.stderr


def test_a_bucket_that_is_not_there_cannot_be_written(bucket: str, tmp_path: Path) -> None:
    place = location(f"s3://none/out{bucket}")
    assert isinstance(place, RemotePath)
    (tmp_path / "a").write_text("1")
    with pytest.raises(StorageError, match=r"cannot be written: .*make the bucket"):
        Mirror(tmp_path, place).sync()


WRITER = """
import sys, time
from pathlib import Path
from trainer import results
from trainer.storage import location
place, folder = location(sys.argv[1]), Path(sys.argv[2])
real, done = results.write_remote, []
def write_remote(place, source):
    if len(done) < 2:
        real(place, source)
        done.append(place)
        return
    sink = place.filesystem.open_output_stream(place.path)
    sink.write(source.read()[:7])
    print("half", flush=True)
    time.sleep(600)
results.write_remote, results.in_parallel = write_remote, lambda work, items: [work(i) for i in items]
results.Mirror(folder, place).sync()
"""


def test_an_upload_that_is_killed_half_way_does_not_open(world: World, bucket: str) -> None:
    uri = f"s3://slim/killed{bucket}"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, uri, str(world.dataset.folder)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    place = location(uri)
    assert isinstance(place, RemotePath)
    assert len(place.files()) == 2, "an object that was half written is none"
    with pytest.raises(DataError, match="has no dataset.json: an upload that did not finish"):
        open_dataset(uri)


READER = """
import json, resource, sys
import numpy as np
from trainer.checkpoint import open_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak()
checkpoint = open_checkpoint(sys.argv[1])
opened = peak()
rows = np.linspace(0, int(sys.argv[2]) - 1, 40).astype(np.int64)
taken = checkpoint.table_rows("big", rows)
extracted = peak()
read = sum(len(chunk) for _, chunk in checkpoint.table_chunks("big"))
same = bool((taken[:, 0].numpy() == rows).all())
print(json.dumps([opened - start, extracted - start, peak() - start, same, read]))
"""


def write_parts(folder: Path, header: dict[str, Any]) -> None:
    """A table of TABLE_ROWS whose rows hold their own number, as PARTS ranks would have written it."""
    rows = TABLE_ROWS // PARTS
    folder.mkdir()
    told = []
    for rank in range(PARTS):
        file, name = f"rank-{rank:05d}.safetensors", f"tables/big/weight@{rank * rows},0"
        values = torch.arange(rank * rows, (rank + 1) * rows, dtype=torch.float32)[:, None].expand(-1, DIM)
        part = {"file": file, "name": name, "offsets": [rank * rows, 0], "sizes": [rows, DIM]}
        entry = {"tables/big/weight": {"shape": [TABLE_ROWS, DIM], "parts": [part]}}
        told.append((entry, {file: write_tensors(folder / file, {name: values.contiguous()})}, None))
    _commit(folder, folder.with_name("big"), header, told)


def test_memory_does_not_grow_with_the_table(world: World, bucket: str, tmp_path: Path) -> None:
    old = world.checkpoint.manifest
    header = {k: old[k] for k in ("run", "fingerprint", "position", "metrics", "plan", "world_size", "table_dims")}
    write_parts(tmp_path / "parts", {**header, "precision": {}})
    place = location(f"s3://slim/big{bucket}")
    assert isinstance(place, RemotePath)
    Mirror(tmp_path / "big", place).sync()
    done = subprocess.run(
        [sys.executable, "-c", READER, str(place), str(TABLE_ROWS)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    opened, extracted, streamed, same, read = json.loads(done.stdout)
    assert (same, read) == (True, TABLE_ROWS)
    assert opened < WORKING_MB, "hashing streams"
    assert extracted < WORKING_MB, "a few rows are all that is held"
    assert streamed < WORKING_MB + 2 * CHUNK_MB, "a chunk at a time"
    shown = open_checkpoint(str(place), verify=False).describe()
    assert shown["tables"]["big"]["parts"] == PARTS
    assert shown["bytes"] > TABLE_ROWS * DIM * 4
