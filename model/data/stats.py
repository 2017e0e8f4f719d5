"""`dinoctl data stats`: mean and standard deviation of the channels, for `data.normalise`."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
from numpy.typing import NDArray

from model import config, storage
from model.data.errors import DataError, UnreadableImageError
from model.data.images import FULL_8, FULL_16
from model.data.threads import Tell, cores, in_threads
from model.data.whole import Whole

Floats = NDArray[np.float64]

SMALLEST_STD = 1e-6
"""Of channels in [0, 1]: a fifteenth of a step of 16 bits, so rounding."""


def measure(whole: Whole, data: config.Data, images: int, tell: Tell) -> config.Statistics:
    """Of `images` images, spread evenly over all; every image counts the same, whatever its size, as it does in
    training. The same on any machine. Raises DataError if none can be read."""
    count = min(images, whole.total)
    numbers = [place * whole.total // count for place in range(count)]
    total, read = np.zeros((2, data.channels)), 0
    for done, moments in enumerate(in_threads(partial(_moments, whole), numbers, cores()), 1):
        if moments is not None:
            total += moments
            read += 1
        tell(done, count)
    if not read:
        kind = f"{data.channels} channels of {data.bits} bits"
        raise DataError(f"none of {count:,} images of {whole.where} are {kind}; `dinoctl data check` says why")
    mean, square = total / read
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return config.Statistics(
        channels=data.channels,
        bits=data.bits,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        images=read,
        unreadable=count - read,
        of=whole.where,
    )


def write(found: config.Statistics, file: str) -> None:
    """For `data.normalise`. Raises DataError if a channel is the same everywhere: its values cannot be divided by 0."""
    if constant := [str(channel) for channel, std in enumerate(found.std) if std < SMALLEST_STD]:
        raise DataError(
            f"channel {', '.join(constant)} (from 0) is the same everywhere in {found.of} and cannot be normalised: "
            "leave it out of the images"
        )
    storage.replace(os.path.abspath(os.path.expanduser(file)), found.model_dump_json(indent=1).encode() + b"\n")


def _moments(whole: Whole, number: int) -> Floats | None:
    """Mean and mean square of each channel, [2, channels]; None for an image that cannot be read."""
    try:
        picture = whole.image(number)
    except UnreadableImageError:
        return None
    full = FULL_8 if picture.dtype == np.uint8 else FULL_16
    pixels = picture.reshape(-1, picture.shape[2]).astype(np.int64)  # sums of integers are exact
    return np.stack([pixels.sum(0) / full, (pixels**2).sum(0) / full**2]) / len(pixels)
