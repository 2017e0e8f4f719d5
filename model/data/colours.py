"""What is done to the colours of a view, as DINO, v2 and v3 publish it: drawn first, then done.

Every picture here is float32 [H, W, C] in [0, 1], and no operation changes the one that it is given. OpenCV does most
of them: in float32 it is several times faster than numpy or torch at a crop's size (docs/augmentation.md).
Saturation, hue and grayscale are for RGB; all else takes any number of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from model import config

Pixels = NDArray[np.float32]

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BLUR_TAPS = 9
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_FROM = np.float32(128 / 255)
FULL_TURN = 360.0
MOST_CHANNELS = 128
"""OpenCV's filters take no more at once."""

cv2.setNumThreads(1)  # the loader's threads each work on an image of their own


@dataclass(frozen=True)
class Colours:
    """What is done to the colours of one view. `jitter`: operations and factors, in order; None or False: left out."""

    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    blur_sigma: float | None = None
    solarize: bool = False


def draw_colours(rng: np.random.Generator, augment: config.Augment, blur: float, solarize: float) -> Colours:
    """What is done to the colours of a view that is blurred and solarised with these probabilities."""
    jitter, grey, blurred, solarized, sigma, *factors = rng.random(9).tolist()
    order = rng.permutation(len(JITTER)).tolist()
    strengths = [getattr(augment, name) for name in JITTER]
    shifts = [(2 * factor - 1) * strength for factor, strength in zip(factors, strengths, strict=True)]
    operations = [
        (name, shift if name == "hue" else max(0.0, 1 + shift)) for name, shift in zip(JITTER, shifts, strict=True)
    ]
    return Colours(
        jitter=tuple(operations[i] for i in order if strengths[i]) if jitter < augment.jitter else (),
        grey=grey < augment.grayscale,
        blur_sigma=BLUR_SIGMA[0] + sigma * (BLUR_SIGMA[1] - BLUR_SIGMA[0]) if blurred < blur else None,
        solarize=solarized < solarize,
    )


def distort(x: Pixels, colours: Colours) -> Pixels:
    """Jitter, then grey, then blur, then solarize. Raises ValueError for what needs RGB and has other channels."""
    for name, factor in colours.jitter:
        x = JITTER[name](x, factor)
    if colours.grey:
        x = saturation(x, 0.0)
    if colours.blur_sigma is not None:
        x = blur(x, colours.blur_sigma)
    return solarize(x) if colours.solarize else x


def brightness(x: Pixels, factor: float) -> Pixels:
    return _cut(x * np.float32(factor))


def contrast(x: Pixels, factor: float) -> Pixels:
    """Towards the mean: of the luma of RGB, of each channel where channels are not colours."""
    if x.shape[2] == len(GREY):
        means = np.float32(np.dot(cv2.mean(x)[: len(GREY)], GREY))
    else:
        means = x.mean(axis=(0, 1))
    scaled = x * np.float32(factor)
    scaled += np.float32(1 - factor) * means
    return _cut(scaled)


def saturation(x: Pixels, factor: float) -> Pixels:
    _needs_rgb(x)
    mix = factor * np.eye(len(GREY), dtype=np.float32) + np.float32(1 - factor) * GREY
    return _cut(_same_shape(cv2.transform(x, mix), x))


def hue(x: Pixels, turn: float) -> Pixels:
    """Turn the hue by a share of the circle, at the same value and chroma (HSV)."""
    _needs_rgb(x)
    hsv: Pixels = np.asarray(cv2.cvtColor(x, cv2.COLOR_RGB2HSV), np.float32)
    hsv[:, :, 0] += FULL_TURN * (turn % 1)  # OpenCV takes up to two turns, but none backwards
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32)


def blur(x: Pixels, sigma: float) -> Pixels:
    """Gaussian of 9 taps, edges reflected."""
    taps = cv2.getGaussianKernel(BLUR_TAPS, sigma, cv2.CV_32F)
    groups = [x[:, :, first : first + MOST_CHANNELS] for first in range(0, x.shape[2], MOST_CHANNELS)]
    blurred = [
        _same_shape(cv2.sepFilter2D(group, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101), group)
        for group in groups
    ]
    return blurred[0] if len(blurred) == 1 else np.concatenate(blurred, axis=2)


def solarize(x: Pixels) -> Pixels:
    return np.where(x >= SOLARIZE_FROM, 1 - x, x)


JITTER: dict[str, Callable[[Pixels, float], Pixels]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
}
"""By their names in `config.Augment`."""


def _cut(x: Pixels) -> Pixels:
    return np.clip(x, 0, 1, out=x)


def _same_shape(made: object, x: Pixels) -> Pixels:
    """OpenCV drops the last axis of a single channel."""
    return np.asarray(made, np.float32).reshape(x.shape)


def _needs_rgb(x: Pixels) -> None:
    if x.shape[2] != len(GREY):
        raise ValueError(
            f"saturation, hue and grayscale need RGB, not {x.shape[2]} channels: set augment.saturation, augment.hue "
            "and augment.grayscale to 0"
        )
