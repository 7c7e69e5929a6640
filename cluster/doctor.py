"""Preflight: will a run work on this machine, and what will hold it up? Each finding says what was found and the fix.

The checks are pure: values in, a Finding out. `examine` at the end gathers the values; it starts no Ray, and imports
torch only after another process could.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.tables import render
from trainer.config import RunConfig
from trainer.errors import SlimrankError
from trainer.progress import size
from trainer.storage import Location

Status = Literal["ok", "warn", "fail"]
TRIPLE = {"torch": "2.13.0", "torchrec": "1.8.0", "ray": "2.60.0"}
FBGEMM = {"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"}  # one of them
CPU_INSTALL = "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0, then pip install --no-deps torchrec==1.8.0"
CPU_FEATURES = {  # what a missing feature costs
    "avx512f": "FBGEMM's lookups and torch's matrix products run on half the width",
    "avx512_vnni": "int8 dense layers gain little over fp32",
    "avx512_bf16": "bf16 dense layers are emulated: train and serve in fp32",
    "amx_bf16": "bf16 matrix products have no tiles",
    "amx_int8": "int8 matrix products have no tiles",
}
# fastest step measured on one thread of the two-core machine: DCNv2 of the Criteo head, bf16 dense part (benchmarks)
NEED_ROWS_PER_S = 21_000
PORTS = {8000: "serve: pass --port", 8265: "Ray's dashboard", 6379: "a Ray head"}
OBJECT_STORE_SHARE = 0.3  # of the memory: Ray's default for its object store
OPEN_FILES = 4096
CPU_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")  # that FBGEMM fuses on CPU


@dataclass(frozen=True)
class Finding:
    """One check's outcome. `fix` is empty where there is nothing to do."""

    name: str
    status: Status
    found: str
    fix: str = ""


# -- software --------------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int]) -> Finding:
    """Python 3.11: what the pinned wheels are built for and tested with."""
    found = f"{version[0]}.{version[1]}"
    if version != (3, 11):
        return Finding("python", "fail", found, "make a virtual environment with Python 3.11, as make unit does")
    return Finding("python", "ok", found)


def check_versions(installed: Mapping[str, str]) -> list[Finding]:
    """torch, torchrec, FBGEMM and Ray are pinned together. `installed`: versions by distribution name."""
    findings = []
    for name, wanted in TRIPLE.items():
        have = installed.get(name)
        if have is None:
            findings.append(Finding(name, "fail", "not installed", f"pip install {name}=={wanted}"))
        elif have.partition("+")[0] != wanted:
            fix = f"install {name}=={wanted}: torch, torchrec and FBGEMM change together or not at all"
            findings.append(Finding(name, "fail", have, fix))
        else:
            findings.append(Finding(name, "ok", have))
    builds = {name: installed[name] for name in FBGEMM if name in installed}
    found = ", ".join(f"{name} {version}" for name, version in builds.items())
    if len(builds) == 2:
        fix = f"both builds lie in one folder: pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, then {CPU_INSTALL}"
        findings.append(Finding("fbgemm", "fail", found, fix))
    elif not builds:
        fix = "pip install fbgemm-gpu-cpu==1.8.0 (fbgemm-gpu==1.8.0 with GPUs)"
        findings.append(Finding("fbgemm", "fail", "not installed", fix))
    elif any(version.partition("+")[0] != FBGEMM[name] for name, version in builds.items()):
        findings.append(Finding("fbgemm", "fail", found, f"install {next(iter(builds))}==1.8.0"))
    else:
        findings.append(Finding("fbgemm", "ok", found))
    return findings


def check_import(error: str | None) -> Finding:
    """`error`: last line of what importing the triple said in another process; None when it went."""
    if error is None:
        return Finding("import", "ok", "torch, fbgemm_gpu and torchrec load")
    if "libtorch_cuda" in error or "libcuda" in error or "libc10_cuda" in error:
        remove = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
        fix = f"a CUDA build of FBGEMM lies over the CPU one: {remove}, then {CPU_INSTALL}"
    elif "undefined symbol" in error:
        fix = f"FBGEMM was built for another torch: {CPU_INSTALL}"
    elif "No module named" in error:
        fix = "a dependency is missing: make clean unit builds the environment anew"
    else:
        fix = f"install the pinned versions anew: {CPU_INSTALL}"
    return Finding("import", "fail", error, fix)


# -- the machine -----------------------------------------------------------------------------------------------------


def check_cpu(flags: Collection[str]) -> Finding:
    """`flags`: as /proc/cpuinfo lists them; none where that is unknown."""
    if not flags:
        return Finding("cpu", "warn", "features unknown: no /proc/cpuinfo flags", "expect AVX2 at the least")
    if "avx2" not in flags:
        return Finding("cpu", "fail", "no AVX2: FBGEMM's CPU kernels need it", "use a machine with AVX2 (x86-64-v3)")
    missing = [name for name in CPU_FEATURES if name not in flags]
    if not missing:
        return Finding("cpu", "ok", "AVX2, AVX-512, VNNI, bf16, AMX")
    costs = "; ".join(f"no {name}: {CPU_FEATURES[name]}" for name in missing)
    if all(name.startswith("amx") for name in missing):
        return Finding("cpu", "ok", f"AVX2, AVX-512, VNNI, bf16; {costs}")
    return Finding("cpu", "warn", costs, "nothing fails; a CPU with these features is faster")


def check_gpu(driver: str | None, cuda_build: str | None, devices: int, nccl: str | None) -> Finding:
    """`driver`: version of the NVIDIA driver, `cuda_build`: CUDA that torch was built for, `devices` it sees."""
    if driver is None and not devices:
        return Finding("gpu", "ok", "none: the CPU trains")
    if cuda_build is None:
        fix = 'install the GPU build: pip install "slimrank[gpu]" in an environment of its own'
        return Finding("gpu", "warn", f"driver {driver}, but torch is a CPU build", fix)
    if not devices:
        fix = f"update the driver for CUDA {cuda_build}, or correct CUDA_VISIBLE_DEVICES"
        return Finding("gpu", "fail", f"driver {driver}, CUDA {cuda_build}, but torch sees no GPU", fix)
    if nccl is None:
        return Finding("gpu", "fail", f"{devices} GPUs, but torch has no NCCL", "use torch's own CUDA wheels")
    return Finding("gpu", "ok", f"{devices} GPUs, driver {driver}, CUDA {cuda_build}, NCCL {nccl}")


def check_threads(workers: int, threads: int, cores: float) -> Finding:
    """`threads`: OMP_NUM_THREADS of a worker; `cores` it may use, by affinity and quota."""
    found = f"{workers} workers x {threads} threads on {cores:g} cores"
    if workers > cores:
        return Finding("threads", "fail", found, f"set train.workers to {max(int(cores), 1)}: Ray would wait for cores")
    if workers * threads > cores:
        fix = f"set OMP_NUM_THREADS={max(int(cores // workers), 1)}: threads that share cores can be 5 times slower"
        return Finding("threads", "warn", found, fix)
    if workers == cores:
        return Finding("threads", "ok", f"{found}; none is left for Ray Data, which training does not use")
    return Finding("threads", "ok", found)


def check_shm(shm_bytes: int | None, memory_bytes: int) -> Finding:
    """Ray's object store lies in /dev/shm, or slowly on disk."""
    if shm_bytes is None:
        return Finding("shm", "warn", "no /dev/shm", "Ray's object store goes to disk: mount a tmpfs there")
    wanted = memory_bytes * OBJECT_STORE_SHARE
    found = f"/dev/shm has {size(shm_bytes)} free"
    if shm_bytes < wanted:
        fix = f"Ray wants {size(wanted)} or goes to disk: start the container with --shm-size {wanted / 1e9:.0f}g"
        return Finding("shm", "warn", found, fix)
    return Finding("shm", "ok", found)


def check_open_files(limit: int) -> Finding:
    """Ray and Parquet readers hold many files."""
    if 0 <= limit < OPEN_FILES:
        return Finding("open files", "warn", f"limit {limit}", f"ulimit -n {OPEN_FILES * 4} before starting Ray")
    return Finding("open files", "ok", f"limit {limit}" if limit >= 0 else "no limit")


def check_ports(taken: Collection[int]) -> Finding:
    """`taken`: those of PORTS that something listens on."""
    if not taken:
        return Finding("ports", "ok", f"{', '.join(map(str, PORTS))} are free")
    found = ", ".join(f"{port} is taken ({PORTS[port]})" for port in sorted(taken))
    return Finding("ports", "warn", found, "pass --port to serve; a Ray that runs is reached with --address")


# -- the run ---------------------------------------------------------------------------------------------------------


def check_memory(table_bytes: int, state_bytes: int, largest_bytes: int, limit_bytes: int) -> Finding:
    """Tables, their state, and one fp32 copy of the largest (a checkpoint is read by the table) in this machine."""
    need = table_bytes + state_bytes + largest_bytes
    found = (
        f"tables {size(table_bytes)}, state {size(state_bytes)}, a copy of the largest {size(largest_bytes)}: "
        f"{size(need)} of {size(limit_bytes)}"
    )
    if need > limit_bytes:
        fix = f"{size(need - limit_bytes)} is missing: lower dim or hash_size, raise min_count, or use more machines"
        return Finding("memory", "fail", found, fix)
    if need > 0.7 * limit_bytes:
        fix = "little is left for batches, Ray and the page cache: lower dim or hash_size, or use more machines"
        return Finding("memory", "warn", found, fix)
    return Finding("memory", "ok", found)


def check_disk(free_bytes: int, checkpoint_bytes: int, kept: int) -> Finding:
    """Kept checkpoints, the latest and the one being written."""
    need = checkpoint_bytes * (kept + 2)
    found = f"{size(free_bytes)} free here, {kept + 2} checkpoints take {size(need)}"
    if need > free_bytes:
        return Finding("disk", "fail", found, "give --out a folder on a larger disk, or lower train.keep_checkpoints")
    return Finding("disk", "ok", found)


def check_reader(rows_per_s: float, workers: int, cores: float, need: float = NEED_ROWS_PER_S) -> Finding:
    """`rows_per_s`: what one reader thread decodes. `need`: rows a second that a worker's step takes at its fastest."""
    found = f"a reader decodes {rows_per_s:,.0f} rows/s; the fastest step measured takes {need:,.0f} a worker"
    share = min(cores / (2 * workers), 1.0)  # a step's thread and a reader's, on the cores there are
    if rows_per_s < need:
        return Finding("reader", "warn", found, "training may wait for data: fewer features, or lower max_length")
    if rows_per_s * share < need:
        fix = f"{2 * workers} threads share {cores:g} cores: training may wait for data: use fewer workers"
        return Finding("reader", "warn", found, fix)
    return Finding("reader", "ok", found)


def check_tables(dims: Mapping[str, int], optimizer: str, dtype: str, device: str) -> list[Finding]:
    """What FBGEMM's training kernels take: dims by table, the table optimizer, the weights' dtype, "cpu" or "cuda"."""
    findings = []
    odd = [f"{name} has dim {dim}" for name, dim in dims.items() if dim % 4]
    if odd:
        fix = "FBGEMM trains dims that are multiples of 4: correct dim or model.embedding_dim"
        findings.append(Finding("dims", "fail", ", ".join(odd[:5]), fix))
    if device == "cpu" and optimizer not in CPU_OPTIMIZERS:
        fix = f"FBGEMM has no fused {optimizer} on CPU: use one of {', '.join(CPU_OPTIMIZERS)}"
        findings.append(Finding("optimizer", "fail", f"train.table_optimizer {optimizer} on cpu", fix))
    if device == "cpu" and dtype not in ("fp32", "fp16"):
        findings.append(Finding("dtype", "fail", f"{dtype} table weights on cpu", "use fp32 or fp16 there"))
    return findings or [Finding("tables", "ok", f"{len(dims)} tables, {optimizer}, {dtype} on {device}")]


# -- the cluster -----------------------------------------------------------------------------------------------------


def host_and_port(address: str) -> tuple[str, int] | None:
    """Where an address points: ray://h:p, http://h:p or h:p; None for "local" and "auto", or when it is none."""
    if address in ("local", "auto"):
        return None
    scheme, _, rest = address.rpartition("://")
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port
    except ValueError:
        return None
    default = {"ray": 10001, "http": 8265, "https": 443, "": 6379}.get(scheme, 6379)
    return (parts.hostname, port or default) if parts.hostname else None


def check_address(address: str | None, error: str | None) -> Finding:
    """`error`: why a connection to the address failed; None when it went, or nothing was tried."""
    if address is None or address in ("local", "auto"):
        return Finding("cluster", "ok", f"{address or 'no address'}: a Ray of this machine is used")
    if host_and_port(address) is None:
        return Finding("cluster", "fail", f"{address} is no address", "write http://HOST:8265 or HOST:6379")
    if error is not None:
        fix = "start Ray there (ray start --head), open the port, or correct --address / RAY_ADDRESS"
        return Finding("cluster", "fail", f"{address}: {error}", fix)
    return Finding("cluster", "ok", f"{address} accepts connections")


def check_token(mode: str | None, has_token: bool, address: str | None) -> Finding:
    """Ray 2.60's `ray start --head` asks clients for a token. `mode`: RAY_AUTH_MODE."""
    remote = address is not None and address != "local"
    copy = "copy .ray/auth_token of the head's home folder to yours (or set RAY_AUTH_TOKEN), and RAY_AUTH_MODE=token"
    if mode is not None and mode.lower() == "disabled":
        return Finding(
            "token", "ok", "RAY_AUTH_MODE=disabled: anyone who reaches the cluster's ports can run code there"
        )
    if mode is not None and mode.lower() == "token" and not has_token:
        return Finding(
            "token", "fail", "RAY_AUTH_MODE=token, but there is no token", f"ray get-auth-token --generate, or {copy}"
        )
    if remote and not has_token:
        return Finding("token", "warn", "no token; a head started by Ray 2.60 asks for one", copy)
    if remote and mode is None:
        fix = "export RAY_AUTH_MODE=token, which clients of such a head need"
        return Finding("token", "warn", "there is a token, but RAY_AUTH_MODE is not set", fix)
    return Finding("token", "ok", "a token is there" if has_token else "no cluster that asks for one")


# -- gathering -------------------------------------------------------------------------------------------------------


def examine(run: RunConfig | None, data: Location | None, address: str | None) -> list[Finding]:
    """All checks on this machine; those of the run with `run`, those of its tables with sizes that can be known."""
    from trainer.machine import cores, machine_memory_bytes

    workers = run.train.max_workers if run is not None else 2
    address = address or os.environ.get("RAY_ADDRESS")
    failure = import_error()
    findings = [
        check_python((sys.version_info.major, sys.version_info.minor)),
        *check_versions(installed_versions()),
        check_import(failure),
        check_cpu(cpu_flags()),
        check_threads(workers, int(os.environ.get("OMP_NUM_THREADS", "1")), cores()),
        check_shm(shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None, machine_memory_bytes()),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_ports([port for port in PORTS if connect_error("127.0.0.1", port) is None]),
        check_address(address, address_error(address)),
        check_token(os.environ.get("RAY_AUTH_MODE"), has_token(os.environ, Path.home()), address),
    ]
    if failure is None:
        findings.append(gpu_here())
        findings += examine_tables(run, data, workers)
    return findings


def examine_tables(run: RunConfig | None, data: Location | None, workers: int) -> list[Finding]:
    """Checks that need the tables' sizes: of prepared data, else of the config where it tells them."""
    import torch

    from cluster.topology import find_tables, table_optimizer, tables_of_dataset
    from trainer.data.dataset import open_dataset
    from trainer.machine import cores, machine_memory_bytes
    from trainer.memory import state_bytes
    from trainer.sharding import check_sharding

    if run is None and data is None:
        return []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dataset = open_dataset(data) if data is not None else None
        known = tables_of_dataset(dataset) if dataset is not None else find_tables(run, None, {}) if run else None
    except SlimrankError as error:
        return [Finding("data", "fail", str(error), "run 'slimrank data prepare'")]
    if known is None:
        fix = "run 'slimrank data prepare', then pass --data"
        return [Finding("memory", "warn", "the tables' sizes are not known before the log is prepared", fix)]
    tables = list(known.tables.values())
    optimizer = table_optimizer(run) if run is not None else "rowwise_adagrad"
    findings = check_tables({t.name: t.embedding_dim for t in tables}, optimizer, "fp32", device)
    try:
        state = sum(state_bytes(optimizer, t.num_embeddings, t.embedding_dim) for t in tables)
        if run is not None:
            check_sharding(known.tables, run.train.sharding, device, workers, optimizer)
    except SlimrankError as error:
        return [*findings, Finding("sharding", "fail", str(error), "correct train.sharding or train.table_optimizer")]
    weights, largest = sum(t.fp32_bytes for t in tables), max(t.fp32_bytes for t in tables)
    kept = run.train.keep_checkpoints if run is not None else 2
    findings.append(check_memory(weights, state, largest, machine_memory_bytes()))
    findings.append(check_disk(shutil.disk_usage(".").free, weights + state, kept))
    if dataset is not None:
        batch = run.train.batch_rows(dataset.rows("train")) if run is not None else 4096
        findings.append(check_reader(decoded_rows_per_s(dataset, batch), workers, cores()))
    return findings


def decoded_rows_per_s(dataset: Any, batch_size: int, seconds: float = 1.0) -> float:
    """Rows a second that one reader thread makes into batches, over about `seconds` (the split again when it ends)."""
    from trainer.data.reader import Reader

    reader = Reader(dataset, "train", batch_size, shuffle=True)
    rows, begun = 0, time.perf_counter()
    for epoch in range(1_000_000):
        for batch, _ in reader.batches(epoch):
            rows += len(batch.dense)
            if time.perf_counter() - begun > seconds:
                return rows / (time.perf_counter() - begun)
    raise AssertionError("unreachable")


def installed_versions() -> dict[str, str]:
    """Versions of the installed distributions that are pinned together, by normalized name."""
    wanted = {*TRIPLE, *FBGEMM}
    named = ((d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions())
    normal = ((name.lower().replace("_", "-"), version) for name, version in named)
    return {name: version for name, version in normal if name in wanted}


def import_error() -> str | None:
    """Last line of what importing the triple says in a process of its own, which a broken library may end."""
    code = "import torch, fbgemm_gpu, torchrec, torchrec.distributed"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said and done.returncode > 0 else f"python died of signal {-done.returncode} at import"


def cpu_flags() -> set[str]:
    """Features of the first CPU that /proc/cpuinfo lists; empty where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def gpu_here() -> Finding:
    """`check_gpu` of this machine."""
    import torch

    path = Path("/proc/driver/nvidia/version")
    driver = path.read_text(encoding="utf-8").splitlines()[0].split("Module")[-1].split()[0] if path.exists() else None
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if devices and torch.distributed.is_nccl_available() else None
    return check_gpu(driver, torch.version.cuda, devices, nccl)


def address_error(address: str | None) -> str | None:
    """Why an address cannot be reached; None when it can, or there is nothing to reach."""
    place = host_and_port(address) if address else None
    return connect_error(*place) if place else None


def connect_error(host: str, port: int, timeout_s: float = 2.0) -> str | None:
    """Why a socket does not connect; None when it does."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return None


def has_token(environment: Mapping[str, str], home: Path) -> bool:
    """Whether Ray would find a token: in the environment, a file named there, or under `home`."""
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return (Path(named) if named else home / ".ray" / "auth_token").is_file()


# -- telling ---------------------------------------------------------------------------------------------------------


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `slimrank doctor --json` prints."""
    return {"findings": [asdict(f) for f in findings], "ok": all(f.status != "fail" for f in findings)}


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings for people: what fails first, each fix under what was found."""
    order = {"fail": 0, "warn": 1, "ok": 2}
    rows = [
        [f.name, f.status.upper() if f.status == "fail" else f.status, f.found + (f"\nfix: {f.fix}" if f.fix else "")]
        for f in sorted(findings, key=lambda f: order[f.status])
    ]
    lines = render("doctor", ["check", "", "found"], rows, numbers=False)
    fails, warns = (sum(f.status == s for f in findings) for s in ("fail", "warn"))
    return [*lines, "", f"{len(findings)} checks: {fails} fail, {warns} warn"]
