"""KoLeo against loops over the formula, by groups, and its sums over micro-batches."""

import math

import pytest
import torch

from model.losses.koleo import koleo


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
    with pytest.raises(ValueError, match=r"at least 2 images in a group, got optim\.group_size 1"):
        koleo(features(), 1, 8)
