"""DINO's cross-entropy against loops over the formula, and its sums over micro-batches."""

import math

import pytest
import torch

from model.losses.dino import crop_scales, dino_cross_entropy


def plain(student, targets, temperature, skip_same):
    """The formula of the docstring, loop by loop."""
    S, B, K = student.shape
    total = 0.0
    count = 0
    for u in range(len(targets)):
        for v in range(S):
            if skip_same and u == v:
                continue
            count += 1
            for i in range(B):
                row = [float(value) / temperature for value in student[v, i]]
                log_sum = math.log(sum(math.exp(value) for value in row))
                total -= sum(float(targets[u, i, k]) * (row[k] - log_sum) for k in range(K))
    return total / (B * count)


def crops(S=2, T=2, B=4, K=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(S, B, K, generator=generator, dtype=torch.float64)
    targets = torch.randn(T, B, K, generator=generator, dtype=torch.float64).softmax(dim=-1)
    return student, targets


@pytest.mark.parametrize(("S", "T", "skip_same"), [(2, 2, True), (2, 2, False), (8, 2, False), (3, 2, True)])
def test_equals_the_formula(S, T, skip_same):
    student, targets = crops(S, T)
    found = dino_cross_entropy(student, targets, 0.1, 4, skip_same=skip_same)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(plain(student, targets, 0.1, skip_same), rel=1e-12)


def test_micro_batches_sum_to_the_whole():
    student, targets = crops(S=8)
    whole = dino_cross_entropy(student, targets, 0.1, 4)
    halves = [dino_cross_entropy(student[:, s], targets[:, s], 0.1, 4) for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(halves), whole)


def test_gradient():
    student, targets = crops(B=2, K=3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dino_cross_entropy(s, targets, 0.1, 2, skip_same=True), student)


def test_extreme_logits_and_half_precision():
    student, targets = crops()
    found = dino_cross_entropy((student * 1e4).bfloat16(), targets.float(), 0.1, 4)
    assert found.dtype == torch.float32
    assert found.isfinite()


def test_autocast_does_not_take_the_products_to_bf16():
    student, targets = crops(K=64)
    student, targets = student.float(), targets.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dino_cross_entropy(student, targets, 0.1, 4)
    torch.testing.assert_close(inside, dino_cross_entropy(student, targets, 0.1, 4), rtol=0, atol=0)


def test_scales_are_the_released_ones():
    assert crop_scales(2, 8) == (2 / 18, 16 / 18)
    assert crop_scales(2, 0) == (1.0, 0.0)
