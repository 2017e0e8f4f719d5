"""Which images are near-duplicates, so that a split never has two forms of one picture on both sides.

Two images belong together if their thumbnails correlate, as they are or mirrored: grey values, mean removed, so that a
recoloured or brightened copy counts too. A lower bar holds for images whose names say that they are of one family
(`lorry1`, `lorry2`): alike in name only, as `fruit/orange` and `fruit/cartoon/orange`, they stay apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import RGB
from model.data.images import Picture

SIDE = 16
ALIKE = 0.93
ALIKE_IN_FAMILY = 0.80
LARGEST_FAMILY = 10
ROWS = 2048
"""Images compared at once with all others: 20,000 x 2,048 correlations are 160 MB."""

Thumbnails = NDArray[np.float32]


def thumbnail(picture: Picture) -> Thumbnails:
    """Grey values [SIDE, SIDE] of an image [H, W, C], mean 0 and norm 1 (all 0 if it is of one colour)."""
    grey = np.array(_grey(picture).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    grey -= grey.mean()
    norm = float(np.linalg.norm(grey))
    return grey / norm if norm > SIDE else np.zeros_like(grey)


def _grey(picture: Picture) -> Image.Image:
    """From 0 to 255: as seen where it is a photograph, else the channels' mean over the range that the image uses, as a
    camera's 12 bits of 16 would look like one colour."""
    if picture.shape[2] == RGB and picture.dtype == np.uint8:
        return Image.fromarray(picture).convert("L")
    mean = picture.mean(axis=2, dtype=np.float32)
    mean -= mean.min()
    return Image.fromarray(mean * np.float32(255 / max(float(mean.max()), 1.0)))


def families(paths: Sequence[str]) -> list[str]:
    """The family of each image: the file's name without its ending and a trailing number (`people/fireman240a.png` is
    of `fireman`). An image is alone, named by its path, if only digits would be left, or if the family is so large
    that the name says nothing: a camera's `img_0001`."""
    names = [re.sub(r"[-_ ]?\d+[a-z]?$", "", PurePosixPath(path).stem.lower()) for path in paths]
    sizes = Counter(names)
    return [name if name and sizes[name] <= LARGEST_FAMILY else path for name, path in zip(names, paths, strict=True)]


def near_duplicates(paths: Sequence[str], contents: Sequence[str], thumbnails: Thumbnails) -> list[int]:
    """Group of each image, numbered from 0 in order of first appearance.

    `contents` are digests of the files (images of one colour have no other likeness), `thumbnails` [n, SIDE, SIDE].
    """
    first: dict[str, int] = {}
    same_file = ((first.setdefault(content, i), i) for i, content in enumerate(contents))
    return union(len(paths), chain(same_file, _alike(paths, thumbnails)))


def equal(keys: Sequence[str]) -> list[int]:
    """Group of each image: those with the same key."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _alike(paths: Sequence[str], thumbnails: Thumbnails) -> Iterator[tuple[int, int]]:
    flat = thumbnails.reshape(len(thumbnails), -1)
    mirrored = thumbnails[:, :, ::-1].reshape(len(thumbnails), -1)
    of = np.array(equal(families(paths)))
    for start in range(0, len(flat), ROWS):
        rows = slice(start, start + ROWS)
        likeness = np.maximum(flat[rows] @ flat.T, mirrored[rows] @ flat.T)
        bar = np.where(of[rows, None] == of[None, :], np.float32(ALIKE_IN_FAMILY), np.float32(ALIKE))
        for row, column in np.argwhere(likeness > bar):
            if start + row < column:
                yield int(start + row), int(column)


def union(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Connected components of `count` images under `pairs`, numbered from 0 in order of first appearance."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return equal([str(root(i)) for i in range(count)])
