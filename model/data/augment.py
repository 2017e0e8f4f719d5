"""Views of one image: where to look (RandomResizedCrop) and what to do to the colours, as DINO, v2 and v3 publish it.

Everything is drawn from (seed, origin, position, view): first all the numbers of a view, whatever its probabilities
say, then what they mean, so that one setting changes what it names and no other draw. Cropping is Pillow's (8 bits,
bicubic, antialiased); colours are float32 arrays in [0, 1], a few crops at a time. Blur follows the papers: global
crop 1 always, global 2 at 0.1, local 0.5 (the released DINOv3 code has the probability inverted).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model import config
from model.data.images import Picture
from model.data.resize import square, unit
from model.data.views import SslViews
from model.draws import generator

Pixels = NDArray[np.float32]
Operation = Callable[[Pixels, Pixels], Pixels]

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BLUR_TAPS = 9
BLUR_SIGMA = (0.1, 2.0)
SOLARIZE_FROM = np.float32(128 / 255)
SIXTHS = np.array([5, 3, 1], np.float32)[:, None, None]
CROP_TRIES = 10
CACHE = 2**20
"""Bytes of crops that are worked on together."""


@dataclass(frozen=True)
class Colours:
    """What is done to the colours of one view. `jitter`: operations and factors, in order; None or False: left out."""

    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    blur_sigma: float | None = None
    solarize: bool = False


# --- the views of a rank's images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Normalised views of b images, crop-major. `gram` are the boxes of the global crops without distortions."""

    global_crops: Pixels  # [2, b, 3, G, G]
    local_crops: Pixels  # [L, b, 3, l, l]
    gram_crops: Pixels | None  # [2, b, 3, g, g]


@dataclass(frozen=True)
class Recipe:
    """How views are made: a phase's settings, and the name of its draws."""

    data: config.Data
    augment: config.Augment
    crops: config.Crops
    seed: int
    origin: str


@dataclass(frozen=True)
class Cut:
    """One view before its colours change."""

    image: Picture  # [side, side, C]
    colours: Colours
    gram: Picture | None = None


def ssl_views(recipe: Recipe, images: Sequence[Picture], positions: Sequence[int], views: SslViews) -> Views:
    """Two global crops, `local_count` local ones and, if a Gram teacher looks, its two views, of each RGB image."""
    samples = list(zip(images, positions, strict=True))
    size, count = views.resolution, recipe.crops.local_count
    globals_ = [_cut_global(recipe, *sample, views, number) for number in range(2) for sample in samples]
    locals_ = [_cut_local(recipe, *sample, size.local_size, number) for number in range(count) for sample in samples]
    gram = [cut.gram for cut in globals_ if cut.gram is not None]
    return Views(
        global_crops=_finish(globals_, recipe.data, (2, len(samples)), size.global_size),
        local_crops=_finish(locals_, recipe.data, (count, len(samples)), size.local_size),
        gram_crops=_finish([Cut(image, Colours()) for image in gram], recipe.data, (2, len(samples)), len(gram[0]))
        if gram
        else None,
    )


def _finish(cuts: list[Cut], data: config.Data, shape: tuple[int, int], side: int) -> Pixels:
    """Distorted and normalised, [*shape, 3, side, side]; a few crops at a time, as many as a core's cache holds."""
    out = np.empty((len(cuts), 3, side, side), np.float32)
    few = max(1, CACHE // (3 * side * side * out.itemsize))
    for start in range(0, len(cuts), few):
        part = cuts[start : start + few]
        x = distort(pixels([cut.image for cut in part]), [cut.colours for cut in part])
        out[start : start + few] = normalise(x, data)
    return out.reshape(*shape, 3, side, side)


def _cut_global(recipe: Recipe, image: Picture, position: int, views: SslViews, number: int) -> Cut:
    """A global crop and the Gram teacher's view of the same box, cut once at the larger of both sizes."""
    a = recipe.augment
    rng = generator(recipe.seed, f"{recipe.origin}/augment", position, "global", number)
    box, flip = _draw_box(rng, recipe, image, recipe.crops.global_scale)
    if number == 0:
        colours = draw_colours(rng, a, a.blur_global_1, 0.0)
    else:
        colours = draw_colours(rng, a, a.blur_global_2, a.solarize_global_2)
    side, gram_side = views.resolution.global_size, views.gram_size
    cut = crop(image, box, flip, max(side, gram_side or 0))
    return Cut(square(cut, side), colours, None if gram_side is None else square(cut, gram_side))


def _cut_local(recipe: Recipe, image: Picture, position: int, side: int, number: int) -> Cut:
    rng = generator(recipe.seed, f"{recipe.origin}/augment", position, "local", number)
    box, flip = _draw_box(rng, recipe, image, recipe.crops.local_scale)
    return Cut(crop(image, box, flip, side), draw_colours(rng, recipe.augment, recipe.augment.blur_local, 0.0))


def whole_views(images: Sequence[Picture], side: int, data: config.Data) -> Pixels:
    """The whole of each RGB image in a square, normalised, [n, 3, side, side]: what text phases look at."""
    return normalise(pixels([square(image, side) for image in images]), data)


def as_released(augment: config.Augment) -> config.Augment:
    """What the released code does for these settings: its blur is applied with one minus each probability."""
    probabilities = {name: 1 - getattr(augment, name) for name in ("blur_global_1", "blur_global_2", "blur_local")}
    return augment.model_copy(update=probabilities)


# --- where to look ----------------------------------------------------------------------------------------------------

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels, as Pillow counts."""


def _draw_box(rng: np.random.Generator, recipe: Recipe, image: Picture, scale: tuple[float, float]) -> tuple[Box, bool]:
    tries = rng.random((CROP_TRIES, 4))
    flip = bool(rng.random() < recipe.augment.horizontal_flip)
    return random_box(tries, (image.shape[1], image.shape[0]), scale, recipe.crops.aspect), flip


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


def crop(image: Picture, box: Box, flip: bool, side: int) -> Picture:
    """The box as a square [side, side, C]. Pixels outside it do not shine in at its edges."""
    left, upper, right, lower = box
    cut = square(image[upper:lower, left:right], side)
    return np.ascontiguousarray(cut[:, ::-1]) if flip else cut


def pixels(images: Sequence[Picture]) -> Pixels:
    """Pictures of one size as [n, C, H, W] in [0, 1]."""
    return unit(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def normalise(x: Pixels, data: config.Data) -> Pixels:
    """(x - mean) / std, channel by channel, of [n, 3, H, W]."""
    mean, std = _statistics(data.mean, data.std)
    return (x - mean) / std


@lru_cache(maxsize=8)
def _statistics(mean: config.Rgb, std: config.Rgb) -> tuple[Pixels, Pixels]:
    return np.array(mean, np.float32)[:, None, None], np.array(std, np.float32)[:, None, None]


# --- colours ----------------------------------------------------------------------------------------------------------


def draw_colours(rng: np.random.Generator, augment: config.Augment, blur: float, solarize: float) -> Colours:
    """What is done to the colours of a view that is blurred and solarised with these probabilities."""
    jitter, grey, blurred, solarized, sigma, *factors = rng.random(9).tolist()
    order = rng.permutation(4).tolist()
    strengths = (augment.brightness, augment.contrast, augment.saturation)
    operations = [
        (name, max(0.0, 1 + (2 * factor - 1) * strength))
        for name, factor, strength in zip(("brightness", "contrast", "saturation"), factors, strengths, strict=False)
    ]
    operations.append(("hue", (2 * factors[3] - 1) * augment.hue))
    return Colours(
        jitter=tuple(operations[i] for i in order) if jitter < augment.jitter else (),
        grey=grey < augment.grayscale,
        blur_sigma=BLUR_SIGMA[0] + sigma * (BLUR_SIGMA[1] - BLUR_SIGMA[0]) if blurred < blur else None,
        solarize=solarized < solarize,
    )


def distort(x: Pixels, colours: Sequence[Colours]) -> Pixels:
    """Jitter, then grey, then blur, then solarize, each of [n, 3, H, W] in [0, 1] by its own `colours`; in place.

    Crops that have the same operation next take it together: the numbers are those of one at a time.
    """
    for turn in range(len(OPERATIONS)):
        for name, operation in OPERATIONS.items():
            factors = {i: c.jitter[turn][1] for i, c in enumerate(colours) if c.jitter and c.jitter[turn][0] == name}
            _change(x, factors, operation)
    _change(x, {i: 0.0 for i, c in enumerate(colours) if c.grey}, saturation)
    _change(x, {i: c.blur_sigma for i, c in enumerate(colours) if c.blur_sigma is not None}, blur)
    _change(x, {i: 0.0 for i, c in enumerate(colours) if c.solarize}, solarize)
    return x


def _change(x: Pixels, factors: dict[int, float], operation: Operation) -> None:
    """Apply an operation to the crops named in `factors`, each with its factor."""
    if factors:
        rows = list(factors)
        x[rows] = operation(x[rows], np.array(list(factors.values()), np.float32)[:, None, None, None])


# Each takes crops [n, 3, H, W] and a factor for each, [n, 1, 1, 1].


def luma(x: Pixels) -> Pixels:
    """[n, 1, H, W]"""
    grey: Pixels = GREY[0] * x[:, :1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:]
    return grey


def _blend(x: Pixels, other: Pixels | np.float32, factor: Pixels) -> Pixels:
    """`factor` of x, the rest of `other`, cut to [0, 1]."""
    return np.clip(factor * x + (1 - factor) * other, 0, 1)


def brightness(x: Pixels, factor: Pixels) -> Pixels:
    return _blend(x, np.float32(0), factor)


def contrast(x: Pixels, factor: Pixels) -> Pixels:
    grey = luma(x).reshape(len(x), -1).mean(axis=1)
    return _blend(x, grey[:, None, None, None], factor)


def saturation(x: Pixels, factor: Pixels) -> Pixels:
    return _blend(x, luma(x), factor)


def hue(x: Pixels, turn: Pixels) -> Pixels:
    """Turn the hue by a share of the circle, at the same value and chroma (HSV)."""
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    value = x.max(axis=1, keepdims=True)
    chroma = value - x.min(axis=1, keepdims=True)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    sixth = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, (blue - red) / safe + np.float32(2), (red - green) / safe + np.float32(4)),
    )
    k = sixth + np.float32(6) * turn + SIXTHS
    k -= np.float32(6) * np.floor(k * np.float32(1 / 6))  # k modulo 6; `%` is several times slower
    turned: Pixels = value - chroma * np.clip(np.minimum(k, np.float32(4) - k), 0, 1)
    return turned


def blur(x: Pixels, sigma: Pixels) -> Pixels:
    """Gaussian of 9 taps, edges reflected: two products with a banded matrix, the fastest way at a crop's size."""
    distance = np.arange(BLUR_TAPS // 2 + 1, dtype=np.float32)
    weights = np.exp(-0.5 * (distance / sigma.reshape(-1, 1)) ** 2)
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(axis=1, keepdims=True)
    rows, columns = (np.tensordot(weights, _taps(side), axes=1)[:, None] for side in x.shape[2:])
    blurred: Pixels = rows @ x @ columns.transpose(0, 1, 3, 2)
    return blurred


def solarize(x: Pixels, _: Pixels) -> Pixels:
    return np.where(x >= SOLARIZE_FROM, 1 - x, x)


OPERATIONS: dict[str, Operation] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
}


@lru_cache(maxsize=16)
def _taps(side: int) -> Pixels:
    """[5, side, side]: which pixels lie 0, 1 .. 4 from each, reflected at the edges."""
    reach = BLUR_TAPS // 2
    if side <= reach:
        raise ValueError(f"a view of {side} pixels is too small to blur with {BLUR_TAPS} taps: make crops larger")
    out = np.zeros((reach + 1, side, side), np.float32)
    rows = np.arange(side)
    for offset in range(-reach, reach + 1):
        columns = np.abs(rows + offset)
        columns = np.where(columns >= side, 2 * (side - 1) - columns, columns)
        np.add.at(out[abs(offset)], (rows, columns), 1)
    return out
