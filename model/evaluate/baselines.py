"""What needs no network: the trivial features that a trained network has to be held against.

Images are [n, side, side, channels] as the networks see them, uint8 or float32 in [0, 1]; features are float32 [n, d].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.evaluate.scores import Floats

Images = NDArray[np.uint8 | np.float32]
RAW_SIDE = 16
HISTOGRAM_BINS = 8


def full(images: Images) -> float:
    """The number that is full light."""
    return 255.0 if images.dtype == np.uint8 else 1.0


def raw_pixels(images: Images) -> Floats:
    """The image brought down to 16x16 by averaging, as one vector. The side must be a multiple of 16."""
    n, side = images.shape[:2]
    cell = side // RAW_SIDE
    cells = images[:, : cell * RAW_SIDE, : cell * RAW_SIDE].reshape(n, RAW_SIDE, cell, RAW_SIDE, cell, -1)
    return np.asarray(cells.mean(axis=(2, 4)).reshape(n, -1) / full(images) - 0.5, dtype=np.float32)


def colour_histogram(images: Images) -> Floats:
    """The square root of a joint RGB histogram of 8x8x8 bins, so that a dot product compares by Hellinger's measure."""
    n, bins = len(images), HISTOGRAM_BINS
    eight = images if images.dtype == np.uint8 else np.round(images * 255)
    level = (eight.reshape(n, -1, 3).astype(np.int64) * bins) // 256
    cell = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    counts = np.stack([np.bincount(row, minlength=bins**3) for row in cell])
    return np.asarray(np.sqrt(counts / counts.sum(axis=1, keepdims=True)), dtype=np.float32)


def position(patches: int) -> Floats:
    """For the dense score: which patch it is and nothing else, one-hot. [patches, patches]."""
    return np.eye(patches, dtype=np.float32)


def patch_pixels(images: Images, patch: int) -> Floats:
    """For the dense score: each patch's own pixels. [n, patches, patch * patch * channels]."""
    n, side = images.shape[:2]
    grid = side // patch
    cells = images.reshape(n, grid, patch, grid, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return np.asarray(cells.reshape(n, grid * grid, -1) / full(images) - 0.5, dtype=np.float32)
