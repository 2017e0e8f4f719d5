"""The staged copy: what becomes of it is a safetensors file, byte for byte, and its memory is used again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model.staging import StagedFile, stage
from model.weights.stream import DTYPES


def whole(file: StagedFile, most: int = 7) -> bytes:
    return b"".join(file.pieces(most))


def test_a_staged_file_is_what_safetensors_itself_writes() -> None:
    tensors = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "step": torch.tensor(3.0),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "naïve": torch.empty(0, 4),
    }
    assert whole(stage([("student", "a", tensors)]).files[0]) == safetensors.torch.save(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.bool), "own": torch.tensor([[0.0, 1.0, 1.0]]).to(dtype).T}
    loaded = safetensors.torch.load(whole(stage([("p", "first", tensors), ("p", "second", tensors)]).files[1]))
    assert loaded["own"].dtype == dtype
    assert loaded["own"].float().equal(tensors["own"].float())
    assert loaded["odd"].all()


def test_what_changes_afterwards_is_not_in_it() -> None:
    weight = torch.ones(4)
    staged = stage([("p", "a", {"w": weight})])
    weight.zero_()
    assert safetensors.torch.load(whole(staged.files[0]))["w"].eq(1).all()


def test_the_memory_of_the_save_before_is_used_again() -> None:
    first = stage([("p", "a", {"w": torch.ones(100)})])
    second = stage([("p", "a", {"w": torch.zeros(60)})], first.buffer)
    assert second.buffer.data_ptr() == first.buffer.data_ptr()
    assert safetensors.torch.load(whole(second.files[0]))["w"].eq(0).all()
    third = stage([("p", "a", {"w": torch.ones(101)})], second.buffer)
    assert third.buffer.nbytes == 404


PEAK = """
import sys
from pathlib import Path
import torch
from model import checkpoint, contract
from model.config import Checkpoints
from model.progress import Progress
from model.saver import Saver
from tests.model.test_checkpoint import make_attempt

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

size = 256 << 20
attempt = make_attempt(Path(sys.argv[1]))
contract.scratch_dir(attempt.launch_name).mkdir(parents=True, exist_ok=True)
parts = {part: {"w": torch.ones(size // 8)} for part in ("student", "optimizer")}
small = {part: {"w": torch.ones(8)} for part in parts}
saver = Saver(attempt, Checkpoints(every=1), torch.distributed.HashStore(), Progress(attempt, 9))
checkpoint.seal(attempt, 1, small, {}, {}, {})
before = peak()
for step in (2, 3):
    saver.start(step, parts, {}, {}, {}, lambda manifest: None)
    saver.ended(wait=True)
print((peak() - before) / size)
"""


@pytest.mark.jobs
@pytest.mark.requires("proc")
def test_two_saves_take_the_memory_of_one_copy(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 0.95 < float(result.stdout) < 1.1
