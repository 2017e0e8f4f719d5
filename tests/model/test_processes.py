"""What an agent starts its processes with."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from model.processes import MEMORY, environment
from tests.model.standin.attempts import make

FREED = """
import ctypes, pathlib
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
before, size = resident(), 20 * 2**20
block = libc.malloc(size)
libc.memset(block, 1, size)
libc.free(block)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc has other settings than glibc's")
def test_memory_that_a_step_frees_stays_with_the_process_for_the_next_one() -> None:
    def kept(**settings: str) -> int:
        environment = {name: value for name, value in os.environ.items() if name not in MEMORY}
        run = subprocess.run([sys.executable, "-c", FREED], env=environment | settings, capture_output=True, text=True)
        return int(run.stdout)

    assert kept() < 2**20
    assert kept(**MEMORY) > 19 * 2**20


def test_what_the_user_sets_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = make(tmp_path, ["steps:1"]).attempt
    for name in MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    found = environment(attempt)
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
    assert found["MKL_DISABLE_FAST_MM"] == MEMORY["MKL_DISABLE_FAST_MM"]
