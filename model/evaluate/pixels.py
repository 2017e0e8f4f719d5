"""The images of an evaluation: whole, square, at one size, as every network and baseline sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from model import draws
from model.config import RGB, Data
from model.data import files
from model.data.images import decode_with_alpha
from model.data.index import Entry
from model.data.resize import square, unit
from model.data.threads import Tell, untold
from model.evaluate.baselines import Images

QUERY_AREA = (0.3, 0.7)
"""Share of the image that a retrieval query shows."""
QUERY_COLOUR = 0.3
"""Brightness, contrast and saturation of a query are scaled by a factor in [1 - this, 1 + this]."""


OPENED = "opened %s of %s images"
"""What `tell` is told of, for the log."""


@dataclass(frozen=True)
class Squares:
    """Whole images as squares, in the order of their entries."""

    images: Images
    opacity: list[NDArray[np.float32] | None]  # [side, side] in [0, 1]; None for an image without transparent pixels


def squares(entries: Sequence[Entry], root: str, side: int, data: Data, tell: Tell = untold) -> Squares:
    """Load every entry. Raises UnreadableImageError if one cannot be read any more, StoreError."""
    images, opacity = [], []
    for done, entry in enumerate(entries, 1):
        image, alpha = decode_with_alpha(files.read(Path(root, entry.path), Path(root)), data)
        images.append(square(image, side))
        opacity.append(None if alpha is None else unit(square(alpha[..., None], side))[..., 0])
        tell(done, len(entries))
    return Squares(np.stack(images), opacity)


def foreground(opacity: NDArray[np.float32], patch: int) -> NDArray[np.bool_]:
    """Which patches are mostly opaque: bool [patches], row by row."""
    grid = len(opacity) // patch
    return np.asarray(opacity.reshape(grid, patch, grid, patch).mean(axis=(1, 3)) > 0.5).reshape(-1)


def queries(images: Images, seed: int) -> Images:
    """One altered view of each image: a crop, mirrored half of the time, its colours shifted. Same shape."""
    return np.stack([_query(image, seed, number) for number, image in enumerate(images)])


def _query(image: Images, seed: int, number: int) -> Images:
    rng = draws.generator(seed, "evaluate/query", number)
    side = len(image)
    length = side * float(np.sqrt(rng.uniform(*QUERY_AREA)))
    left, top = rng.uniform(0, side - length, 2)
    box = (left, top, left + length, top + length)
    mirrored = rng.random() < 0.5
    factors = rng.uniform(1 - QUERY_COLOUR, 1 + QUERY_COLOUR, 3)
    if image.dtype != np.uint8 or image.shape[2] != RGB:
        return _altered(image, box, mirrored, factors)
    view = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=box)
    if mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        view = enhance(view).enhance(factor)
    return np.asarray(view)


def _altered(
    image: Images, box: tuple[float, ...], mirrored: bool, factors: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The same of an image that Pillow cannot hold, but for saturation, which only colours have."""
    left, top, right, bottom = (round(edge) for edge in box)
    x = unit(square(image[top:bottom, left:right], len(image)))
    x = np.clip(x[:, ::-1] if mirrored else x, 0, 1) * np.float32(factors[0])
    mean = x.mean(dtype=np.float32)
    altered: NDArray[np.float32] = np.clip(mean + np.float32(factors[1]) * (x - mean), 0, 1)
    return altered
