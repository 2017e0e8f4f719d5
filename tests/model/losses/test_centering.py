"""Centering against plain loops in float64, its fixed points, and over two processes."""

import math

import pytest
import torch
from torch import multiprocessing

from model import parallel
from model.losses.centering import Center, batch_mean, centered
from model.networks.init import create

SHARES = [5, 0]
"""Rows of each rank: none at rank 1."""


def logits(n=5, K=4, seed=0):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_targets_equal_the_plain_formula():
    z, c, T = logits(), logits(1, seed=1), 0.3
    found = centered(z, c, T)
    for i in range(5):
        weights = [math.exp((z[i, k].item() - c[0, k].item()) / T) for k in range(4)]
        assert found[i].tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)
    assert centered(z.bfloat16(), c.float(), T).dtype == torch.float32


def test_the_centre_follows_the_batches_by_momentum():
    own = create(lambda: Center(4), 0, "dino_center").double()
    assert own.center.tolist() == [[0.0] * 4]
    expected = [0.0] * 4
    for step in range(3):
        z = logits(seed=step)
        own.follow(batch_mean(z), 0.9, torch.tensor(True))
        own.follow(batch_mean(z) * torch.nan, 0.9, torch.tensor(False))
        expected = [0.9 * c + 0.1 * sum(z[i, k].item() for i in range(5)) / 5 for k, c in enumerate(expected)]
        assert own.center[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_common_offset_of_the_batch_disappears_and_sharpening_stays():
    z = logits()
    everywhere = centered(z + 7 * torch.eye(4, dtype=torch.float64)[2], batch_mean(z) + 7 * torch.eye(4)[2], 0.1)
    torch.testing.assert_close(everywhere, centered(z, batch_mean(z), 0.1), rtol=1e-9, atol=1e-12)
    assert centered(z, batch_mean(z), 0.01).amax(dim=1).min() > 0.9


def test_extreme_logits_stay_finite():
    assert centered(logits().float() * 1e4, torch.zeros(1, 4), 0.04).isfinite().all()


def test_no_rows_anywhere():
    assert batch_mean(torch.zeros(0, 4)).tolist() == [[0.0] * 4]


def _run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SHARES))
    first = sum(SHARES[:rank])
    torch.save(batch_mean(logits()[first : first + SHARES[rank]]), f"{store}.{rank}")
    parallel.leave()


@pytest.mark.jobs
def test_two_processes_have_one_mean(tmp_path):
    store = tmp_path / "store"
    multiprocessing.spawn(_run_rank, args=(store,), nprocs=len(SHARES))
    for rank in range(len(SHARES)):
        torch.testing.assert_close(torch.load(f"{store}.{rank}"), batch_mean(logits()), rtol=1e-12, atol=0)
