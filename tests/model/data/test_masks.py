from __future__ import annotations

import numpy as np
import pytest

from model.data.masks import block_mask, group_masks, masked_counts


@pytest.mark.parametrize(("pixels", "total"), [(96, 174), (224, 974), (256, 1274), (512, 5114)])
def test_counts_are_those_of_the_released_code(pixels: int, total: int) -> None:
    """Measured there for 16 images, patches of 16 pixels, probability 0.5 and ratios 0.1 to 0.5."""
    counts = masked_counts(32, (pixels // 16) ** 2, 0.5, (0.1, 0.5))
    assert len(counts) == 16
    assert sum(counts) == total


@pytest.mark.parametrize("grid", [2, 3, 6, 14])
def test_every_group_masks_exactly_as_many(grid: int) -> None:
    expected = sorted([0] * 8 + masked_counts(16, grid * grid, 0.5, (0.1, 0.5)))
    for seed in range(20):
        masks = group_masks(np.random.default_rng(seed), 16, grid, 0.5, (0.1, 0.5))
        assert masks.shape == (16, grid * grid)
        assert sorted(masks.sum(axis=1).tolist()) == expected


def test_which_crops_are_masked_is_drawn() -> None:
    drawn = np.stack([group_masks(np.random.default_rng(seed), 8, 6, 0.5, (0.1, 0.5)) for seed in range(400)])
    assert drawn.any(axis=2).mean(axis=0) == pytest.approx([0.5] * 8, abs=0.1)


@pytest.mark.parametrize("count", [0, 1, 5, 60, 196])
def test_a_mask_has_exactly_the_patches_asked_for(count: int) -> None:
    assert block_mask(np.random.default_rng(0), 14, count).sum() == count


def test_masks_are_blocks() -> None:
    """Neighbours share their fate far more often than scattered patches would (0.3 x 0.3 + 0.7 x 0.7 = 0.58)."""
    masks = np.stack([block_mask(np.random.default_rng(seed), 14, 59) for seed in range(50)])
    assert (masks[:, :, 1:] == masks[:, :, :-1]).mean() > 0.8


def test_probability_zero_masks_nothing() -> None:
    assert not group_masks(np.random.default_rng(0), 8, 6, 0.0, (0.1, 0.5)).any()
