"""Views are made at twice the speed of torchvision's v2 transforms, whichever images these are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.jobs
def test_views_take_half_of_torchvisions_time() -> None:
    command = [sys.executable, "-P", "-m", "tests.benchmarks.augment", "--json", "--batch", "2", "--rounds", "9"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    told = json.loads(subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout)
    assert len(told) == 4
    for cell, rates in told.items():
        assert min(value for name, value in rates.items() if name.startswith("times")) > 2, cell
