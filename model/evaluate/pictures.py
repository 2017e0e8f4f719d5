"""Pictures of what the backbone sees: patch features by their first three principal components, and attention heads."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import RGB
from model.evaluate.baselines import Images, full
from model.evaluate.scores import Floats

TILE = 96
"""Side of one tile, pixels."""


def patch_pca(patches: Floats) -> NDArray[np.uint8]:
    """The first three principal components over all patches as RGB. [n, grid*grid, d] -> uint8 [n, grid, grid, 3].

    Components are scaled together between the 1st and 99th percentile, so that equal colours mean equal features.
    """
    n, count, _ = patches.shape
    grid = int(count**0.5)
    flat = patches.reshape(n * count, -1).astype(np.float64)
    flat -= flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    # A component's sign is arbitrary: fixing it keeps the colours of two runs comparable.
    axes = axes[:3] * np.sign(axes[:3].sum(axis=1, keepdims=True))
    low, high = np.percentile(parts := flat @ axes.T, [1, 99], axis=0)
    scaled = np.clip((parts - low) / (high - low + 1e-12), 0, 1) * 255
    return np.asarray(scaled.reshape(n, grid, grid, 3), dtype=np.uint8)


def attention_tiles(attention: Floats, grid: int) -> NDArray[np.uint8]:
    """Attention of the CLS token to the patches, each head scaled to its own maximum. [n, heads, grid*grid] ->
    uint8 [n, heads, grid, grid, 3]."""
    maps = attention / attention.max(axis=-1, keepdims=True)
    grey = (maps * 255).astype(np.uint8).reshape(*attention.shape[:2], grid, grid)
    return np.repeat(grey[..., None], 3, axis=-1)


def shown(images: Images) -> NDArray[np.uint8]:
    """Images [n, h, w, channels] as RGB: photographs as they are; of others the first three channels (one as grey),
    each stretched over what it holds in that image."""
    if images.shape[3] == RGB:
        return np.asarray(np.round(images * (255 / full(images))), dtype=np.uint8)
    some = images[..., :RGB].astype(np.float32)
    low, high = np.percentile(some, [1, 99], axis=(1, 2), keepdims=True)
    eight = np.asarray(np.clip((some - low) / (high - low + 1e-12), 0, 1) * 255, dtype=np.uint8)
    if eight.shape[3] == 1:
        return np.repeat(eight, RGB, axis=3)
    return np.pad(eight, [(0, 0), (0, 0), (0, 0), (0, RGB - eight.shape[3])])


def sheet(images: NDArray[np.uint8], columns: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG with one row an image: the image, then one tile from each of `columns` ([n, h, w, 3])."""
    canvas = Image.new("RGB", (TILE * (1 + len(columns)), TILE * len(images)), "white")
    for row, image in enumerate(images):
        tiles = [image, *(column[row] for column in columns)]
        for column, tile in enumerate(tiles):
            how = Image.Resampling.BICUBIC if column == 0 else Image.Resampling.NEAREST
            canvas.paste(Image.fromarray(tile).resize((TILE, TILE), how), (column * TILE, row * TILE))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
