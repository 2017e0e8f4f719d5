"""The contrastive loss against the naive formula, however the batch is cut."""

import pytest
import torch
from torch.nn import functional as F

from model.losses.contrastive import contrastive

B, E = 12, 7


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(B, E, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2))
    return images, texts, torch.tensor(14.0, dtype=dtype, requires_grad=True)


def naive(images, texts, scale):
    """The formula of the docstring, term by term."""
    x, y = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    total = torch.zeros((), dtype=images.dtype)
    for i in range(B):
        total = total - (scale * x[i] @ y[i] - torch.logsumexp(torch.stack([scale * x[i] @ y[j] for j in range(B)]), 0))
        total = total - (scale * y[i] @ x[i] - torch.logsumexp(torch.stack([scale * y[i] @ x[j] for j in range(B)]), 0))
    return total / (2 * B)


def cut(images, texts, scale, micro):
    """Backward through micro-batches of `micro` pairs; the sum of their losses."""
    with torch.no_grad():
        everything = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    total = 0.0
    for first in range(0, B, micro):
        rows = slice(first, first + micro)
        loss = contrastive(
            F.normalize(images[rows], dim=-1), F.normalize(texts[rows], dim=-1), scale, *everything, first
        )
        loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("micro", [12, 3, 1])
def test_micro_batches_sum_to_the_formula(micro):
    expected = leaves()
    loss = naive(*expected)
    loss.backward()
    found = leaves()
    assert cut(*found, micro) == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_knows_matching_pairs():
    eye = torch.eye(4)
    matched = contrastive(eye, eye, torch.tensor(100.0), eye, eye, 0)
    shuffled = contrastive(eye, eye[[1, 0, 3, 2]], torch.tensor(100.0), eye, eye[[1, 0, 3, 2]], 0)
    assert matched < 1e-6
    assert shuffled > 99


def test_is_fp32_under_autocast():
    images, texts, scale = leaves(torch.float32)
    x, y = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    plain = contrastive(x, y, scale, x.detach(), y.detach(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive(x, y, scale, x.detach(), y.detach(), 0)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
