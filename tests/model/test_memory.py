"""`model.memory` in a process of its own: what it sets lasts for the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from model import memory

def step():  # blocks of 1 to 8 MB that are freed in another order
    kept = [torch.ones(size << 18) for size in (1, 8, 2, 4, 8, 1, 2)]
    return sum(float((tensor + 1)[0]) for tensor in kept[::-1])

torch.set_num_threads(1)
kept = memory.keep_freed()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.requires("proc")
def test_steps_ask_the_kernel_for_no_more_memory() -> None:
    result = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    assert kept == "True"
    assert int(faults) < 6_000  # the heap may grow once more; without it they are 60,960
