"""Sinkhorn-Knopp against the plain formula in float64, with logits that overflow it, and over several processes."""

import math
import random

import pytest
import torch
from torch import multiprocessing

from model import parallel
from model.losses.sinkhorn import sinkhorn


def plain(logits, temperature, iterations=3):
    """The formula of the docstring, loop by loop; `logits` a list of rows."""
    n, prototypes = len(logits), len(logits[0])
    Q = [[math.exp(value / temperature) for value in row] for row in logits]
    total = sum(map(sum, Q))
    Q = [[value / total for value in row] for row in Q]
    for _ in range(iterations):
        for k in range(prototypes):
            mass = sum(Q[i][k] for i in range(n))
            for i in range(n):
                Q[i][k] /= prototypes * mass
        for i in range(n):
            mass = sum(Q[i])
            for k in range(prototypes):
                Q[i][k] /= n * mass
    return torch.tensor([[n * value for value in row] for row in Q], dtype=torch.float64)


def rows(n, prototypes, seed=0, spread=1.0):
    draw = random.Random(seed)
    return [[draw.gauss(0, spread) for _ in range(prototypes)] for _ in range(n)]


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("n", "prototypes"), [(1, 5), (7, 5), (12, 30)])
def test_equals_the_plain_formula(n, prototypes, iterations):
    logits = rows(n, prototypes)
    found = sinkhorn(torch.tensor(logits, dtype=torch.float64), 0.07, iterations)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain(logits, 0.07, iterations), rtol=1e-11, atol=1e-14)


def test_rows_are_distributions_and_prototypes_are_used_alike():
    found = sinkhorn(torch.tensor(rows(64, 8), dtype=torch.float64), 0.3, iterations=100)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(found.sum(dim=0), torch.full((8,), 8.0, dtype=torch.float64))


@pytest.mark.parametrize("logits", [rows(9, 6, spread=1e4), [[1e4, -1e4, -1e4]] * 4, [[-1e4] * 3, [1e4] * 3]])
def test_extreme_logits_stay_finite_in_fp32(logits):
    found = sinkhorn(torch.tensor(logits), 0.04)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(logits)))


def test_half_precision_is_promoted():
    logits = torch.tensor(rows(6, 4)).bfloat16()
    torch.testing.assert_close(sinkhorn(logits, 0.1), sinkhorn(logits.float(), 0.1), rtol=0, atol=0)


def test_no_rows_at_all():
    assert sinkhorn(torch.zeros(0, 4), 0.07).shape == (0, 4)


SHARES = [3, 0, 5]
"""Rows of each rank: unequal, and none at rank 1."""


def _run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SHARES))
    first = sum(SHARES[:rank])
    for spread in (1.0, 1e4):
        logits = torch.tensor(rows(sum(SHARES), 6, spread=spread), dtype=torch.float64)
        torch.save(sinkhorn(logits[first : first + SHARES[rank]], 0.07), f"{store}.{spread}.{rank}")
    parallel.leave()


@pytest.mark.jobs
def test_three_processes_with_unequal_rows_equal_one(tmp_path):
    store = tmp_path / "store"
    multiprocessing.spawn(_run_rank, args=(store,), nprocs=len(SHARES))
    for spread in (1.0, 1e4):
        together = torch.cat([torch.load(f"{store}.{spread}.{rank}") for rank in range(len(SHARES))])
        logits = rows(sum(SHARES), 6, spread=spread)
        torch.testing.assert_close(together, sinkhorn(torch.tensor(logits, dtype=torch.float64), 0.07))
        if spread == 1.0:  # the plain formula overflows on the other
            torch.testing.assert_close(together, plain(logits, 0.07))
