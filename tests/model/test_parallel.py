"""Sums, gathers and gradients, alone and between two real processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model import parallel

TWO_RANKS = """
import torch
from torch import nn
from model import parallel

store = parallel.join("gloo")
rank = parallel.rank()
assert parallel.world() == 2
own = torch.tensor([[1.0, 2.0]]) * (rank + 1)
assert parallel.all_reduce_sum(own).tolist() == [[3.0, 6.0]]
assert own.tolist() == [[1.0 * (rank + 1), 2.0 * (rank + 1)]], "the argument must stay as it is"
assert parallel.all_gather(own).tolist() == [[1.0, 2.0], [2.0, 4.0]]
assert parallel.all_gather(own, dim=1).tolist() == [[1.0, 2.0, 2.0, 4.0]]
flags = parallel.all_gather(torch.tensor([rank == 0]))
assert flags.tolist() == [True, False]
assert parallel.gather_text("é" * 3 * rank) == ["", "ééé"]
assert parallel.gather_text("") == ["", ""]

both, first, none = (nn.Parameter(torch.ones(3, 2)) for _ in range(3))
half = nn.Parameter(torch.ones(2, dtype=torch.float64))
both.grad = torch.full((2, 3), 1.0 + rank).T  # not contiguous
half.grad = torch.full((2,), 1.0 + rank, dtype=torch.float64)
if rank == 0:
    first.grad = torch.full((3, 2), 5.0)
parallel.reduce_gradients([both, first, half, none])
assert both.grad.eq(3.0).all() and first.grad.eq(5.0).all() and half.grad.eq(3.0).all() and none.grad.eq(0.0).all()
store.set(f"seen-{rank}", "yes")
assert store.get(f"seen-{1 - rank}") == b"yes"
parallel.leave()
"""


def run_ranks(script: str, world: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `script` in `world` processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", script, *arguments],
            env={
                "PATH": "/usr/bin:/bin", "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


@pytest.mark.jobs
def test_two_processes_agree() -> None:
    for result in run_ranks(TWO_RANKS, 2):
        assert result.returncode == 0, result.stderr


def test_alone_every_function_means_the_same() -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    total, gathered = parallel.all_reduce_sum(tensor), parallel.all_gather(tensor)
    assert total.tolist() == gathered.tolist() == [1.0, 2.0]
    assert not total.requires_grad
    assert total.data_ptr() != tensor.data_ptr() != gathered.data_ptr()
    unused = nn.Parameter(torch.ones(2))
    parallel.reduce_gradients([unused])
    assert unused.grad is not None
    assert unused.grad.eq(0.0).all()
    assert parallel.gather_text("one") == ["one"]
    assert (parallel.rank(), parallel.world()) == (0, 1)
