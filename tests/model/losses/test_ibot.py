"""iBOT's cross-entropy against loops over the formula, and its sums over micro-batches."""

import math

import pytest
import torch

from model.losses.ibot import ibot_cross_entropy, mask_weights


def masked_crops(C=4, N=9, K=5, seed=0):
    """Logits and targets of every patch of C crops, and masks; the last crop is not masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(C, N, K, generator=generator, dtype=torch.float64)
    targets = torch.randn(C, N, K, generator=generator, dtype=torch.float64).softmax(dim=-1)
    masks = torch.rand(C, N, generator=generator) < 0.5
    masks[-1] = False
    return logits, targets, masks


def plain(logits, targets, masks, temperature):
    total = 0.0
    for c in range(len(masks)):
        masked = [j for j in range(masks.shape[1]) if masks[c, j]]
        for j in masked:
            row = [float(value) / temperature for value in logits[c, j]]
            log_sum = math.log(sum(math.exp(value) for value in row))
            entropy = -sum(float(t) * (value - log_sum) for t, value in zip(targets[c, j], row, strict=True))
            total += entropy / len(masked)
    return total / len(masks)


def share(logits, targets, masks, crops):
    return ibot_cross_entropy(logits[masks], targets[masks], mask_weights(masks), 0.1, crops)


def test_equals_the_formula_and_unmasked_crops_count():
    logits, targets, masks = masked_crops()
    assert share(logits, targets, masks, 4).item() == pytest.approx(plain(logits, targets, masks, 0.1), rel=1e-6)


def test_micro_batches_sum_to_the_whole_one_of_them_without_a_mask():
    logits, targets, masks = masked_crops()
    parts = [share(logits[s], targets[s], masks[s], 4) for s in (slice(0, 2), slice(2, 3), slice(3, 4))]
    assert parts[2] == 0
    torch.testing.assert_close(sum(parts), share(logits, targets, masks, 4))


def test_no_masked_patch_still_has_a_gradient_path():
    logits = torch.zeros(0, 5, requires_grad=True)
    ibot_cross_entropy(logits, torch.zeros(0, 5), torch.zeros(0), 0.1, 4).backward()
    assert logits.grad is not None


def test_gradient():
    logits, targets, masks = masked_crops(C=2, N=3, K=3, seed=1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: share(values, targets, masks, 2), logits)


def test_extreme_logits_and_half_precision():
    logits, targets, masks = masked_crops()
    found = share((logits * 1e4).bfloat16(), targets.float(), masks, 4)
    assert found.dtype == torch.float32
    assert found.isfinite()


def test_mask_weights_keep_the_order_of_the_masked_patches():
    masks = torch.tensor([[[True, False, True, True]], [[False, True, False, False]]])
    torch.testing.assert_close(mask_weights(masks), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
