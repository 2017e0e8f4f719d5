"""1.7 billion images in 170,000 shards: what a process keeps of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.requires("proc")
@pytest.mark.jobs
def test_the_index_of_the_7bs_images_is_small_and_read_at_once() -> None:
    command = [sys.executable, "-P", "-m", "tests.benchmarks.index", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["images"] == 1_700_000_000
    assert told["shards"] == 170_000
    assert told["peak memory, MiB"] < 1000
    assert told["start: set read, first batch drawn, s"] < 10
