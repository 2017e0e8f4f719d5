"""KoLeo against loops over the formula, by groups, and its sums over micro-batches."""

import math

import pytest
import torch
from torch import multiprocessing

from model import parallel
from model.losses.koleo import koleo, koleo_gathered


def features(b=8, D=5, seed=0):
    return torch.randn(b, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(features, group_size):
    rows = [[float(value) for value in row] for row in features]
    norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
    unit = [[value / norm for value in row] for row, norm in zip(rows, norms, strict=True)]
    total = 0.0
    for i in range(len(unit)):
        first = i // group_size * group_size
        distances = [math.dist(unit[i], unit[j]) for j in range(first, first + group_size) if j != i]
        total -= math.log(min(distances) + 1e-8)
    return total / len(unit)


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_equals_the_formula(group_size):
    x = features()
    assert koleo(x, group_size, 8).item() == pytest.approx(plain(x, group_size), rel=1e-6)
    assert koleo(x, group_size, 8).dtype == torch.float64


def test_micro_batches_sum_to_the_whole():
    x = features(b=12)
    parts = [koleo(x[s], 4, 12) for s in (slice(0, 4), slice(4, 12))]
    torch.testing.assert_close(sum(parts), koleo(x, 4, 12))


def test_gradient():
    x = features(b=4, D=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: koleo(values, 4, 4), x)


def test_equal_and_huge_and_half_precision_features_stay_finite():
    x = torch.ones(4, 3, requires_grad=True)
    loss = koleo(x, 4, 4)
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert koleo((features() * 1e4).bfloat16(), 4, 8).isfinite()
    assert koleo(features().bfloat16(), 4, 8).dtype == torch.float32


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 images in a group, got 1 "):
        koleo(features(), 1, 8)


def _run_rank(rank, store, group_size):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = features().requires_grad_()
    mine = own[4 * rank : 4 * rank + 4]
    loss = koleo_gathered(mine, parallel.all_gather(mine), 4 * rank, group_size, 8)
    loss.backward()
    torch.save((loss.detach(), own.grad), f"{store}.{rank}")
    parallel.leave()


@pytest.mark.jobs
@pytest.mark.parametrize("group_size", [4, 8])
def test_groups_over_two_processes_equal_one(tmp_path, group_size):
    store = tmp_path / "store"
    multiprocessing.spawn(_run_rank, args=(store, group_size), nprocs=2)
    x = features().requires_grad_()
    whole = koleo(x, group_size, 8)
    whole.backward()
    (first, one), (second, other) = (torch.load(f"{store}.{rank}") for rank in range(2))
    torch.testing.assert_close(first + second, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(one + other, x.grad, rtol=1e-9, atol=1e-14)


def test_a_rank_looks_at_its_own_groups_alone():
    x = features(b=12)
    loss = koleo_gathered(x[4:6], x, 4, 4, 12)
    x[:4] = x[8:] = float("nan")
    assert torch.equal(koleo_gathered(x[4:6], x, 4, 4, 12), loss)
