"""cluster/doctor.py: every finding can be forced, and each that is not ok says how to mend it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from cluster import doctor
from cluster.cli import main
from cluster.doctor import (
    CPU_FEATURES,
    Finding,
    check_address,
    check_cpu,
    check_disk,
    check_gpu,
    check_import,
    check_memory,
    check_open_files,
    check_ports,
    check_python,
    check_reader,
    check_shm,
    check_tables,
    check_threads,
    check_token,
    check_versions,
    connect_error,
    finding_lines,
    has_token,
    host_and_port,
    import_error,
    installed_versions,
    summary,
)

GB = 1000**3
WHOLE = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "ray": "2.60.0", "fbgemm-gpu-cpu": "1.8.0"}
FLAGS = {"avx2", *CPU_FEATURES}


@pytest.mark.parametrize(
    ("finding", "status", "words"),
    [
        (check_python((3, 11)), "ok", "3.11"),
        (check_python((3, 12)), "fail", "Python 3.11"),
        (check_import(None), "ok", "load"),
        (check_import("OSError: libtorch_cuda.so: cannot open"), "fail", "CUDA build of FBGEMM lies over the CPU one"),
        (check_import("ImportError: undefined symbol: _ZN3c10"), "fail", "built for another torch"),
        (check_import("ModuleNotFoundError: No module named 'tensordict'"), "fail", "dependency is missing"),
        (check_import("python died of signal 11 at import"), "fail", "install the pinned versions anew"),
        (check_cpu(FLAGS), "ok", "AMX"),
        (check_cpu(FLAGS - {"amx_int8"}), "ok", "no amx_int8: int8 matrix"),
        (check_cpu(FLAGS - {"avx512_vnni"}), "warn", "no avx512_vnni: int8 dense layers"),
        (check_cpu({"sse4_2"}), "fail", "no AVX2"),
        (check_cpu(set()), "warn", "unknown"),
        (check_gpu(None, None, 0, None), "ok", "the CPU trains"),
        (check_gpu("580.1", None, 0, None), "warn", "torch is a CPU build"),
        (check_gpu("470.1", "13.0", 0, None), "fail", "update the driver for CUDA 13.0"),
        (check_gpu("580.1", "13.0", 8, None), "fail", "no NCCL"),
        (check_gpu("580.1", "13.0", 8, "2.28.3"), "ok", "8 GPUs"),
        (check_threads(2, 1, 4.0), "ok", "2 workers x 1 threads on 4 cores"),
        (check_threads(2, 1, 2.0), "ok", "none is left for Ray Data"),
        (check_threads(2, 4, 4.0), "warn", "OMP_NUM_THREADS=2"),
        (check_threads(4, 1, 1.5), "fail", "train.workers to 1"),
        (check_shm(64 << 20, 16 * GB), "warn", "--shm-size 5g"),
        (check_shm(None, 16 * GB), "warn", "mount a tmpfs"),
        (check_shm(8 * GB, 16 * GB), "ok", "8.0 GB free"),
        (check_open_files(1024), "warn", "ulimit -n"),
        (check_open_files(-1), "ok", "no limit"),
        (check_ports([]), "ok", "free"),
        (check_ports([8000, 6379]), "warn", "6379 is taken (a Ray head), 8000 is taken (serve: pass --port)"),
        (check_memory(10 * GB, GB, 4 * GB, 12 * GB), "fail", "3.0 GB is missing"),
        (check_memory(6 * GB, GB, 3 * GB, 12 * GB), "warn", "little is left"),
        (check_memory(2 * GB, GB, GB, 12 * GB), "ok", "4.0 GB of 12.0 GB"),
        (check_disk(10 * GB, 3 * GB, 2), "fail", "train.keep_checkpoints"),
        (check_disk(13 * GB, 3 * GB, 2), "ok", "4 checkpoints take 12.0 GB"),
        (check_reader(1000, 2, 8.0), "warn", "may wait for data: fewer features"),
        (check_reader(30_000, 4, 4.0), "warn", "8 threads share 4 cores"),
        (check_reader(30_000, 2, 4.0), "ok", "30,000 rows/s"),
        (check_address(None, None), "ok", "a Ray of this machine"),
        (check_address("http://head:8265", None), "ok", "accepts connections"),
        (check_address("http://head:8265", "Connection refused"), "fail", "ray start --head"),
        (check_address("head:port", None), "fail", "is no address"),
        (check_token("disabled", False, "h:6379"), "ok", "anyone who reaches"),
        (check_token("token", False, None), "fail", "ray get-auth-token --generate"),
        (check_token(None, False, "h:6379"), "warn", "auth_token of the head"),
        (check_token(None, True, "h:6379"), "warn", "export RAY_AUTH_MODE=token"),
        (check_token("token", True, "h:6379"), "ok", "a token is there"),
        (check_token(None, False, None), "ok", "no cluster"),
    ],
)
def test_each_finding_can_be_forced(finding: Finding, status: str, words: str) -> None:
    assert finding.status == status
    assert words in f"{finding.found} {finding.fix}"
    assert (finding.fix != "") == (status != "ok")
    assert "\n" not in finding.found + finding.fix


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"torch": "2.12.0"}, "torch", "install torch==2.13.0"),
        ({"torchrec": None}, "torchrec", "not installed"),
        ({"ray": "2.50.0"}, "ray", "2.50.0"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm", "not installed"),
        ({"fbgemm-gpu-cpu": "1.7.0"}, "fbgemm", "install fbgemm-gpu-cpu==1.8.0"),
        ({"fbgemm-gpu": "1.8.0"}, "fbgemm", "both builds lie in one folder"),
    ],
)
def test_another_version_of_the_triple_fails(change: dict, name: str, words: str) -> None:
    assert {f.status for f in check_versions(WHOLE)} == {"ok"}
    installed = {n: v for n, v in (WHOLE | change).items() if v is not None}
    (bad,) = [f for f in check_versions(installed) if f.status == "fail"]
    assert bad.name == name
    assert words in f"{bad.found} {bad.fix}"


def test_versions_here_are_the_pinned_ones() -> None:
    assert {f.status for f in check_versions(installed_versions())} == {"ok"}


@pytest.mark.parametrize(
    ("dims", "optimizer", "dtype", "device", "failing"),
    [
        ({"a": 16}, "rowwise_adagrad", "fp32", "cpu", []),
        ({"a": 16}, "adam", "bf16", "cuda", []),
        ({"a": 10, "b": 8}, "adagrad", "fp32", "cpu", ["dims"]),
        ({"a": 16}, "adam", "fp32", "cpu", ["optimizer"]),
        ({"a": 16}, "sgd", "bf16", "cpu", ["dtype"]),
        ({"a": 6}, "adam", "bf16", "cpu", ["dims", "optimizer", "dtype"]),
    ],
)
def test_what_the_kernels_do_not_take_fails(dims: dict, optimizer: str, dtype: str, device: str, failing: list) -> None:
    assert [f.name for f in check_tables(dims, optimizer, dtype, device) if f.status == "fail"] == failing


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("http://head:8265", ("head", 8265)),
        ("http://head", ("head", 8265)),
        ("ray://head", ("head", 10001)),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("head:port", None),
        ("", None),
    ],
)
def test_address_is_read(address: str, place: tuple | None) -> None:
    assert host_and_port(address) == place


def test_connection_is_really_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connect_error("127.0.0.1", port) is None
    assert "refused" in str(connect_error("127.0.0.1", port)).lower()


def test_token_is_found_where_ray_looks(tmp_path: Path) -> None:
    assert not has_token({}, tmp_path)
    assert has_token({"RAY_AUTH_TOKEN": "x"}, tmp_path)
    assert not has_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert has_token({}, tmp_path)
    assert has_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token")}, Path("/nowhere"))


def test_import_error_is_that_of_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cuda.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_error() == "OSError: libtorch_cuda.so: cannot open shared object file"
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 11)")
    assert import_error() == "python died of signal 11 at import"


def test_findings_fit_the_terminal_and_fails_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    findings = [check_python((3, 11)), check_open_files(10), check_python((3, 9))]
    lines = finding_lines(findings)
    assert all(len(line) <= 60 for line in lines)
    text = "\n".join(lines)
    assert text.index("FAIL") < text.index("warn") < text.index("ok")
    assert "fix: ulimit" in text
    assert lines[-1] == "3 checks: 1 fail, 1 warn"
    assert not summary(findings)["ok"]
    assert summary(findings[:2])["ok"], "a warning is no failure"


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import check starts a process; one test of it is enough."""
    monkeypatch.setattr(doctor, "import_error", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def command(tmp_path: Path, *arguments: object, hash_size: int | None = None, **train: object) -> tuple[Result, dict]:
    features = [{"name": "user", "kind": "categorical", **({"hash_size": hash_size} if hash_size else {})}]
    data = {"input": "log.parquet", "tasks": [{"name": "click", "column": "label"}], "features": features}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"name": "small", "data": data, "train": {"workers": 1, **train}})
    )
    done = CliRunner().invoke(main, ["doctor", "--config", str(tmp_path / "run.yaml"), "--json", *map(str, arguments)])
    told = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout else {}
    return done, {f["name"]: f for f in told.get("findings", [])}


@pytest.mark.usefixtures("quick")
def test_doctor_finds_this_machine_fit_for_a_small_run(tmp_path: Path) -> None:
    import ray

    done, findings = command(tmp_path, hash_size=100)
    assert done.exit_code == 0, done.output
    assert findings["memory"]["status"] == findings["import"]["status"] == "ok"
    assert not ray.is_initialized()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("hash_size", "train", "name", "status", "words"),
    [
        (2_000_000_000, {}, "memory", "fail", "is missing"),
        (None, {}, "memory", "warn", "not known before the log is prepared"),
        (100, {"workers": 500}, "threads", "fail", "train.workers"),
        (100, {"sharding": {"tables": {"user": {"kernel": "fused_uvm"}}}}, "sharding", "fail", "kernel fused_uvm"),
        (100, {"sharding": {"default": "column_wise"}}, "sharding", "fail", "rowwise_adagrad"),
        (100, {"sharding": {"tables": {"usr": "row_wise"}}}, "sharding", "fail", "no such table"),
    ],
)
def test_doctor_checks_the_run(
    tmp_path: Path, hash_size: int | None, train: dict, name: str, status: str, words: str
) -> None:
    done, findings = command(tmp_path, hash_size=hash_size, **train)
    assert findings[name]["status"] == status, done.output
    assert words in findings[name]["found"] + findings[name]["fix"]
    assert done.exit_code == (1 if status == "fail" else 0)


@pytest.mark.usefixtures("quick")
def test_doctor_tries_the_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert command(tmp_path, "--address", address, hash_size=9)[1]["cluster"]["status"] == "ok"
    done, findings = command(tmp_path, "--address", address, hash_size=9)
    assert findings["cluster"]["status"] == "fail"
    assert done.exit_code == 1


@pytest.mark.usefixtures("quick")
def test_doctor_names_what_is_no_prepared_data(tmp_path: Path) -> None:
    findings = command(tmp_path, "--data", tmp_path, hash_size=9)[1]
    assert "not a prepared data set" in findings["data"]["found"]


def test_reader_is_really_measured(tmp_path: Path) -> None:
    from cluster.doctor import decoded_rows_per_s
    from trainer.data.dataset import Dataset, PartFile
    from trainer.data.schema import DataConfig
    from trainer.data.transform import IdMap, TableInfo, Transform

    pq.write_table(
        pa.table({"sparse.user": list(range(300)), "labels": pa.array([[1.0]] * 300, pa.list_(pa.float32(), 1))}),
        tmp_path / "part.parquet",
    )
    data = DataConfig(input="x", tasks=[{"column": "label"}], features=[{"name": "user", "kind": "categorical"}])
    transform = Transform(data, {"user": TableInfo("user", "hash", 300, 4, ("user",))}, {"user": IdMap(298)}, {})
    dataset = Dataset(tmp_path, transform, {"train": [PartFile(str(tmp_path / "part.parquet"), (300,))]}, {}, {})
    assert 100 < decoded_rows_per_s(dataset, 100, seconds=0.05) < 1e8
