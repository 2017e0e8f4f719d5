"""iBOT's block masks (arXiv 2111.07832, section 3; block-wise as in BEiT, arXiv 2106.08254, algorithm 1).

DINOv3's counts: of the m crops of a group int(m x probability) are masked, with ratios spread evenly over the range, so
that the number of masked patches is the same in every group and at every step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SMALLEST_BLOCK = 4
ASPECT = (0.3, 1 / 0.3)
TRIES = 10

Mask = NDArray[np.bool_]


def masked_counts(crops: int, patches: int, probability: float, ratio: tuple[float, float]) -> list[int]:
    """How many patches are masked in each of the masked crops, ascending."""
    masked = int(crops * probability)
    upper = np.linspace(*ratio, masked + 1, dtype=np.float32)[1:]
    return [int(patches * float(share)) for share in upper]


def group_masks(
    rng: np.random.Generator, crops: int, grid: int, probability: float, ratio: tuple[float, float]
) -> Mask:
    """Masks [crops, grid x grid] of the crops of one group, in random order; the unmasked ones are all False."""
    counts = masked_counts(crops, grid * grid, probability, ratio)
    masks = np.zeros((crops, grid * grid), dtype=bool)
    for row, count in zip(rng.permutation(crops), counts, strict=False):
        masks[row] = block_mask(rng, grid, count).reshape(-1)
    return masks


def block_mask(rng: np.random.Generator, grid: int, count: int) -> Mask:
    """A mask [grid, grid] of exactly `count` patches: rectangles as long as they fit, then single patches."""
    mask = np.zeros((grid, grid), dtype=bool)
    missing = count
    while missing > 0:
        added = _add_block(rng, mask, min(missing, grid * grid // 2))
        if added == 0:
            break
        missing -= added
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[rng.choice(free, size=missing, replace=False)] = True
    return mask


def _add_block(rng: np.random.Generator, mask: Mask, most: int) -> int:
    """Mask one more rectangle that adds 1 to `most` patches; how many it added, 0 if none was found."""
    height, width = mask.shape
    for _ in range(TRIES):
        area = rng.uniform(min(SMALLEST_BLOCK, most), most)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(block.sum())
        if 0 < new <= most:
            block[:] = True
            return new
    return 0
