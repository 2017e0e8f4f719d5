"""Resizing pictures: bicubic and antialiased, as Pillow does it, by torch, whose 8-bit kernel is several times faster.

docs/augmentation.md has the figures, and how far it is from Pillow's.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from model.data.images import Picture

KERNEL_CHANNELS = 4
"""Torch's 8-bit kernel is fast for as many at once."""
MERGED_CHANNELS = 128
"""OpenCV merges no more."""
FULL = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def square(picture: Picture, side: int) -> Picture:
    """The whole picture [H, W, C] as a square of `side` pixels, its shape not kept: what random resized crops, text
    phases and evaluations look at. [side, side, C]: 8 bits stay 8 bits, all else becomes float32 in [0, 1]."""
    if picture.dtype != np.uint8:
        picture = unit(picture)
    if picture.shape[:2] == (side, side):
        return picture
    planes = torch.from_numpy(picture).permute(2, 0, 1)
    batch = planes[None] if len(planes) <= KERNEL_CHANNELS else planes[:, None]
    resized = interpolate(batch, (side, side), mode="bicubic", antialias=True).reshape(-1, side, side)
    if picture.dtype != np.uint8:  # bicubic overshoots at edges; the 8-bit kernel cuts by itself
        resized = resized.clamp_(0, 1)
    return _interleaved(resized.numpy())


def _interleaved(planes: Picture) -> Picture:
    """[H, W, C] of [C, H, W], contiguous: OpenCV is ten times as fast at it as numpy."""
    if len(planes) > MERGED_CHANNELS:
        return np.ascontiguousarray(planes.transpose(1, 2, 0))
    merged = cv2.merge([*planes])
    return np.asarray(merged, planes.dtype).reshape(*planes.shape[1:], len(planes))


def unit(picture: Picture) -> NDArray[np.float32]:
    """Float32 in [0, 1], whatever the type."""
    x = picture.astype(np.float32, copy=False)
    return x if picture.dtype == np.float32 else x * np.float32(1 / FULL[picture.dtype])
