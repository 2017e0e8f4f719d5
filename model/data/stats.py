"""`dinoctl data stats`: mean and standard deviation of the channels, for `data.mean` and `data.std`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from model.data.errors import DataError, UnreadableImageError
from model.data.shards import Tell
from model.data.threads import cores, in_threads
from model.data.whole import Whole

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stats:
    """Of RGB in [0, 1]. Every image counts the same, whatever its size, as it does in training."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    unreadable: int


def measure(whole: Whole, images: int, tell: Tell) -> Stats:
    """Of `images` images, spread evenly over all. The same on any machine. Raises DataError if none can be read."""
    count = min(images, whole.total)
    numbers = [place * whole.total // count for place in range(count)]
    total, read = np.zeros((2, 3)), 0
    for done, moments in enumerate(in_threads(partial(_moments, whole), numbers, cores()), 1):
        if moments is not None:
            total += moments
            read += 1
        tell(done, count)
    if not read:
        raise DataError(f"none of {count:,} images of {whole.where} can be read; `dinoctl data check` names them")
    mean, square = total / read
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return Stats(tuple(map(float, mean)), tuple(map(float, std)), read, count - read)


def _moments(whole: Whole, number: int) -> Floats | None:
    """Mean and mean square of each channel, [2, 3]; None for an image that cannot be read."""
    try:
        pixels = whole.image(number).reshape(-1, 3).astype(np.int64)  # sums of integers are exact
    except UnreadableImageError:
        return None
    return np.stack([pixels.sum(0) / 255, (pixels**2).sum(0) / 255**2]) / len(pixels)
