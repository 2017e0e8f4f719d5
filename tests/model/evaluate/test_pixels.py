"""Images of an evaluation that are no photographs: what is asked of them, counted and drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from model import draws
from model.evaluate import baselines, pictures, pixels, tasks
from model.evaluate.baselines import Images

SIDE = 32


def images(channels: int, kind: type[np.uint8 | np.float32] = np.uint8) -> Images:
    x = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, channels), dtype=np.uint8)
    return x if kind is np.uint8 else x.astype(np.float32) / np.float32(255)


def test_queries_of_photographs_are_those_that_they_always_were() -> None:
    asked = pixels.queries(images(3), seed=5)
    rng = draws.generator(5, "evaluate/query", 1)
    length = SIDE * float(np.sqrt(rng.uniform(*pixels.QUERY_AREA)))
    left, top = rng.uniform(0, SIDE - length, 2)
    box = (left, top, left + length, top + length)
    view = Image.fromarray(images(3)[1]).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.7, 1.3))
    assert np.array_equal(asked[1], np.asarray(view))


@pytest.mark.parametrize(("channels", "kind"), [(1, np.uint8), (5, np.uint8), (3, np.float32), (5, np.float32)])
def test_queries_of_other_images_look_alike_and_differ(channels: int, kind: type[np.uint8 | np.float32]) -> None:
    gallery = np.zeros((1, SIDE, SIDE, channels), kind)
    gallery[:, :, SIDE // 2 :] = 200 if kind is np.uint8 else 0.8  # its right half is bright
    asked = pixels.queries(np.repeat(gallery, 8, axis=0), seed=1)
    assert (asked.shape, asked.dtype) == ((8, SIDE, SIDE, channels), np.dtype(np.float32))
    assert 0 <= asked.min() < 0.1 < asked.max() <= 1
    bright = asked[..., 0].mean(axis=1) > 0.4
    assert {bool(row[0]) for row in bright} == {False, True}  # some of them are mirrored
    assert len(np.unique(asked.max(axis=(1, 2, 3)))) > 4


def test_colours_are_counted_where_there_are_some() -> None:
    eight, same = tasks.pixel_features(images(3)), tasks.pixel_features(images(3, np.float32))
    assert set(eight) == {"raw pixels", "colour histogram"}
    for name, found in eight.items():
        np.testing.assert_allclose(same[name], found, atol=1e-6)
    assert set(tasks.pixel_features(images(5))) == {"raw pixels"}
    assert baselines.patch_pixels(images(5), 8).shape == (3, 16, 8 * 8 * 5)


def test_pictures_show_any_channels() -> None:
    assert np.array_equal(pictures.shown(images(3)), images(3))
    assert np.array_equal(pictures.shown(images(3, np.float32)), images(3))
    dim = images(5, np.float32) / 100
    assert pictures.shown(dim).shape == (3, SIDE, SIDE, 3)
    assert pictures.shown(dim).max() == 255  # stretched
    assert not pictures.shown(images(2))[..., 2].any()
    grey = pictures.shown(images(1))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert pictures.sheet(grey, []).startswith(b"\x89PNG")
