"""trainer/machine.py: what is freed is kept for the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from trainer.machine import keep_freed_memory
kept = keep_freed_memory()
step = lambda: [torch.ones(2**24) for _ in range(3)]
for _ in range(8):  # the heap grows to what the steps need
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_was_freed_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library has no mallopt")
    assert int(faults) < 5_000  # 245,760 pages are touched
