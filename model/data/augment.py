"""Views of one image: where to look (RandomResizedCrop) and what to do to the colours, as DINO, v2 and v3 publish it.

Everything is drawn from (seed, origin, position, view): first all the numbers of a view, whatever its probabilities
say, then what they mean, so that one setting changes what it names and no other draw. Pictures have any type and any
number of channels; colours are changed in float32. Blur follows the papers: global crop 1 always, global 2 at 0.1,
local 0.5 (the released DINOv3 code has the probability inverted).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model import config
from model.data.colours import Colours, Pixels, distort, draw_colours
from model.data.images import Picture
from model.data.resize import square, unit
from model.data.views import SslViews
from model.draws import generator

CROP_TRIES = 10

Kind = Literal["global", "local"]

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels, as Pillow counts."""


# --- the views of a rank's images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Normalised views of b images, crop-major. `gram` are the boxes of the global crops without distortions."""

    global_crops: Pixels  # [2, b, C, G, G]
    local_crops: Pixels  # [L, b, C, l, l]
    gram_crops: Pixels | None  # [2, b, C, g, g]


@dataclass(frozen=True)
class Recipe:
    """How views are made: a phase's settings, and the name of its draws."""

    data: config.Data
    augment: config.Augment
    crops: config.Crops
    seed: int
    origin: str


@dataclass(frozen=True)
class Look:
    """All that is drawn for one view."""

    box: Box
    flip: bool
    colours: Colours


def ssl_views(recipe: Recipe, images: Sequence[Picture], positions: Sequence[int], views: SslViews) -> Views:
    """Two global crops, `local_count` local ones and, if a Gram teacher looks, its two views, of each image."""
    sizes, count = views.resolution, recipe.crops.local_count
    made = Views(
        global_crops=_empty(2, images, sizes.global_size),
        local_crops=_empty(count, images, sizes.local_size),
        gram_crops=None if views.gram_size is None else _empty(2, images, views.gram_size),
    )
    for at, (image, position) in enumerate(zip(images, positions, strict=True)):
        for number in range(2):
            look = draw_look(recipe, image, position, "global", number)
            cut = crop(image, look.box, max(sizes.global_size, views.gram_size or 0))
            _finish(cut, look.flip, look.colours, recipe.data, made.global_crops[number, at])
            if made.gram_crops is not None:
                _finish(cut, look.flip, Colours(), recipe.data, made.gram_crops[number, at])
        for number in range(count):
            look = draw_look(recipe, image, position, "local", number)
            cut = crop(image, look.box, sizes.local_size)
            _finish(cut, look.flip, look.colours, recipe.data, made.local_crops[number, at])
    return made


def whole_views(images: Sequence[Picture], side: int, data: config.Data) -> Pixels:
    """The whole of each image in a square, normalised, [n, C, side, side]: what text phases look at."""
    made = _empty(1, images, side)
    for image, out in zip(images, made[0], strict=True):
        _finish(image, False, Colours(), data, out)
    return made.reshape(made.shape[1:])


def _empty(count: int, images: Sequence[Picture], side: int) -> Pixels:
    """[count, b, C, side, side]"""
    return np.empty((count, len(images), images[0].shape[2], side, side), np.float32)


def _finish(cut: Picture, flip: bool, colours: Colours, data: config.Data, out: Pixels) -> None:
    """A crop [H, W, C] resized, distorted and, channel by channel, normalised into `out` [C, side, side]."""
    x = distort(unit(square(cut, out.shape[-1])), colours)
    if flip:
        x = x[:, ::-1]  # last, where it costs nothing: no operation knows left from right
    for plane, into, mean, std in zip(x.transpose(2, 0, 1), out, data.mean, data.std, strict=True):
        np.divide(np.subtract(plane, np.float32(mean), out=into), np.float32(std), out=into)


def as_released(augment: config.Augment) -> config.Augment:
    """What the released code does for these settings: its blur is applied with one minus each probability."""
    probabilities = {name: 1 - getattr(augment, name) for name in ("blur_global_1", "blur_global_2", "blur_local")}
    return augment.model_copy(update=probabilities)


# --- where to look ----------------------------------------------------------------------------------------------------


def draw_look(recipe: Recipe, image: Picture, position: int, kind: Kind, number: int) -> Look:
    """Global or local view `number` of the image at `position`."""
    augment, crops = recipe.augment, recipe.crops
    rng = generator(recipe.seed, f"{recipe.origin}/augment", position, kind, number)
    tries = rng.random((CROP_TRIES, 4))
    flip = bool(rng.random() < augment.horizontal_flip)
    blur, solarize = augment.blur_local, 0.0
    if kind == "global":
        blur, solarize = ((augment.blur_global_1, 0.0), (augment.blur_global_2, augment.solarize_global_2))[number]
    scale = crops.global_scale if kind == "global" else crops.local_scale
    box = random_box(tries, (image.shape[1], image.shape[0]), scale, crops.aspect)
    return Look(box, flip, draw_colours(rng, augment, blur, solarize))


def random_box(
    tries: NDArray[np.float64], size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """RandomResizedCrop's box: a share of the area, uniform in `scale`, and a log-uniform aspect; the first of the
    tries ([n, 4] uniform draws: area, aspect, left, upper) that fits, else the largest central box within `aspect`."""
    width, height = size
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for area, ratio, left, upper in tries.tolist():
        target = width * height * (scale[0] + area * (scale[1] - scale[0]))
        shape = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(upper * (height - h + 1))
            return x, y, x + w, y + h
    shape = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def crop(image: Picture, box: Box, side: int) -> Picture:
    """What lies in the box as a square [side, side, C]; pixels outside do not shine in at its edges."""
    left, upper, right, lower = box
    return square(image[upper:lower, left:right], side)
