"""What this process may use of the machine: memory and cores, or its container's share where that is less."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CGROUP_MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_CPU = "/sys/fs/cgroup/cpu.max"  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
CGROUP1_CPU = ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30  # as much as mallopt's int can well say


def machine_memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for path in CGROUP_MEMORY if (limit := cgroup_limit(Path(path))) is not None)])


def cgroup_limit(path: Path) -> int | None:
    """Bytes that a control group's file allows; None where there is no such file or no limit."""
    word = _read(path)
    return int(word) if word.isdigit() and int(word) > 0 else None


def keep_freed_memory() -> bool:
    """Have malloc keep what a training step frees for the next step; False where the C library is not glibc.

    glibc gives blocks above 32 MiB, and the top of its heap, back to the kernel at once, which then zeroes pages for
    the next activations: 12,000 page faults a step of 4,096 rows, 25% to 30% of its time on the two-core machine.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # older versions take no threshold above 32 MiB for blocks mapped one by one
    mapped = any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEPT_BYTES, 2**25))
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and mapped


def cores() -> float:
    """Cores this process may use: by affinity, or its container's quota where that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = cpu_quota(_read(Path(CGROUP_CPU)) or " ".join(_read(Path(path)) for path in CGROUP1_CPU))
    return allowed if quota is None else min(allowed, quota)


def cpu_quota(text: str) -> float | None:
    """Cores of "QUOTA PERIOD"; None where there is no quota ("max", -1) or nothing was said."""
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1]) or None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
