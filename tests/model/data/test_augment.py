"""The views of an image; what is drawn is done as torchvision does it, which is imported by tests only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch import Tensor

from model import config
from model.data import augment
from model.data.augment import Kind, Look, Recipe, as_released, draw_look, ssl_views
from model.data.colours import BLUR_TAPS, Pixels
from model.data.images import Picture
from model.data.views import SslViews, resolution_at

SIZES = config.Resolution(global_size=32, local_size=16)
DATA = config.Data(path="x")


def recipe(crops: config.Crops, values: config.Augment | None = None, seed: int = 0) -> Recipe:
    return Recipe(DATA, values or config.Augment(), crops, seed, "pretrain")


def sources(count: int = 2, height: int = 60, width: int = 60) -> list[Picture]:
    """Smooth coloured pictures with some exact greys, blacks and whites."""
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.random((count, 3, 8, 8), dtype=np.float32))
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    x[:, :, :2] = 0.5
    x[:, :, 2:4] = torch.tensor([0.0, 1.0]).repeat(width // 2)
    return [(255 * one).permute(1, 2, 0).numpy().astype(np.uint8) for one in x]


# --- as torchvision's v2 transforms make them -------------------------------------------------------------------------


def torchvisions(image: Picture, look: Look, side: int, in_8_bits: bool) -> Tensor:
    """The view by torchvision's v2 operations, [3, side, side] in [0, 1]: colours on a Pillow image, as in DINOv3's
    pipeline, or in float32."""
    left, upper, right, lower = look.box
    x = Image.fromarray(image)
    x = tv.resized_crop(x, upper, left, lower - upper, right - left, [side, side], tv.InterpolationMode.BICUBIC)
    x = tv.horizontal_flip(x) if look.flip else x
    x = x if in_8_bits else tv.to_dtype(tv.to_image(x), torch.float32, scale=True)
    for name, factor in look.colours.jitter:
        x = getattr(tv, f"adjust_{name}")(x, factor)
    x = tv.to_grayscale(x, 3) if look.colours.grey else x
    if look.colours.blur_sigma is not None:
        x = tv.gaussian_blur(x, [BLUR_TAPS, BLUR_TAPS], [look.colours.blur_sigma] * 2)
    x = tv.solarize(x, 128 if in_8_bits else 128 / 255) if look.colours.solarize else x
    return tv.to_dtype(tv.to_image(x), torch.float32, scale=True)


@pytest.mark.parametrize(("in_8_bits", "on_average", "in_any_view"), [(True, 2.0, 3.0), (False, 0.1, 0.5)])
def test_the_whole_chain_is_torchvisions_with_the_same_draws(
    in_8_bits: bool, on_average: float, in_any_view: float
) -> None:
    """Within 2 of 255 levels: Pillow rounds hue and saturation to 8 bits, which in float32 nobody does."""
    images, positions = sources(6, 100, 130), list(range(6))
    sizes = config.Resolution(global_size=64, local_size=32)
    made_by = recipe(config.Crops(resolutions=[sizes], local_count=4))
    views = ssl_views(made_by, images, positions, SslViews(sizes, 16))
    mean, std = (torch.tensor(values)[:, None, None] for values in (DATA.mean, DATA.std))
    kinds: list[tuple[Kind, Pixels]] = [("global", views.global_crops), ("local", views.local_crops)]
    levels = []
    for kind, made in kinds:
        for number, position in np.ndindex(made.shape[:2]):
            look = draw_look(made_by, images[position], position, kind, number)
            found = torch.from_numpy(made[number, position]) * std + mean
            reference = torchvisions(images[position], look, made.shape[-1], in_8_bits)
            levels.append(255 * (found - reference).abs().mean().item())
    assert np.mean(levels) < on_average
    assert max(levels) < in_any_view


def test_cropping_is_torchvisions_on_the_same_box() -> None:
    image = sources(1, 90, 90)[0]
    found = torch.from_numpy(augment.crop(image, (10, 20, 70, 65), 32)).permute(2, 0, 1)
    source = torch.from_numpy(image).permute(2, 0, 1)
    cut = tv.resized_crop(source, 20, 10, 45, 60, [32, 32], tv.InterpolationMode.BICUBIC, antialias=True)
    assert (found.int() - cut.int()).abs().max() <= 1


# --- where to look ----------------------------------------------------------------------------------------------------


def test_boxes_keep_to_area_and_aspect_and_lie_inside() -> None:
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(500):
        left, upper, right, lower = augment.random_box(rng.random((10, 4)), (120, 100), (0.05, 0.32), (0.75, 4 / 3))
        assert 0 <= left < right <= 120
        assert 0 <= upper < lower <= 100
        areas.append((right - left) * (lower - upper) / 12_000)
        aspects.append((right - left) / (lower - upper))
    assert 0.045 < min(areas) < 0.07
    assert 0.30 < max(areas) < 0.33
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    assert np.mean(areas) == pytest.approx(0.185, abs=0.01)


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 1), (3, 2)])
def test_a_box_is_found_in_any_image(size: tuple[int, int]) -> None:
    left, upper, right, lower = augment.random_box(np.full((10, 4), 0.999), size, (0.9, 1.0), (0.75, 4 / 3))
    assert 0 <= left < right <= size[0]
    assert 0 <= upper < lower <= size[1]


# --- which views ------------------------------------------------------------------------------------------------------


def test_shapes_and_that_one_more_view_shifts_no_other() -> None:
    few, many = (
        ssl_views(recipe(config.Crops(resolutions=[SIZES], local_count=n)), sources(), [5, 6], SslViews(SIZES, 8))
        for n in (1, 3)
    )
    assert many.global_crops.shape == (2, 2, 3, 32, 32)
    assert many.local_crops.shape == (3, 2, 3, 16, 16)
    assert many.gram_crops is None
    np.testing.assert_array_equal(few.global_crops, many.global_crops)
    np.testing.assert_array_equal(few.local_crops, many.local_crops[:1])


def test_draws_depend_on_the_position_and_the_seed_alone() -> None:
    crops_ = config.Crops(resolutions=[SIZES], local_count=2)
    views = SslViews(SIZES, 8)
    first, second = sources()
    both = ssl_views(recipe(crops_), [first, second], [5, 6], views)
    one = ssl_views(recipe(crops_), [second], [6], views)
    np.testing.assert_array_equal(both.local_crops[:, 1:], one.local_crops)
    np.testing.assert_array_equal(both.global_crops[:, 1:], one.global_crops)
    assert (ssl_views(recipe(crops_), [second], [7], views).global_crops != one.global_crops).any()
    assert (ssl_views(recipe(crops_, seed=1), [second], [6], views).global_crops != one.global_crops).any()


def test_without_distortions_the_gram_view_is_the_global_crop() -> None:
    plain = config.Augment(jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, solarize_global_2=0)
    crops_ = config.Crops(resolutions=[SIZES], local_count=0)
    found = ssl_views(recipe(crops_, plain), sources(), [0, 1], SslViews(SIZES, 8, gram=True))
    assert found.gram_crops is not None
    np.testing.assert_array_equal(found.gram_crops, found.global_crops)


def test_the_gram_view_is_undistorted_and_of_its_own_size() -> None:
    sizes = SIZES.model_copy(update={"gram_size": 64})
    crops_ = config.Crops(resolutions=[sizes], local_count=0)
    plain = config.Augment(jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, solarize_global_2=0)
    strong, calm = (
        ssl_views(recipe(crops_, values), sources(), [0, 1], SslViews(sizes, 8, gram=True))
        for values in (config.Augment(), plain)
    )
    assert strong.gram_crops is not None
    assert strong.gram_crops.shape == (2, 2, 3, 64, 64)
    np.testing.assert_array_equal(strong.gram_crops, calm.gram_crops)
    assert np.abs(strong.global_crops - calm.global_crops).mean() > 0.05


def test_no_flip_at_zero_and_a_mirror_image_at_one() -> None:
    crops_ = config.Crops(resolutions=[SIZES], local_count=1)
    plain = {
        "jitter": 0,
        "grayscale": 0,
        "blur_global_1": 0,
        "blur_global_2": 0,
        "blur_local": 0,
        "solarize_global_2": 0,
    }
    never, always = (
        ssl_views(
            recipe(crops_, config.Augment(horizontal_flip=p, **plain)), sources(), [0, 1], SslViews(SIZES, 8, True)
        )
        for p in (0.0, 1.0)
    )
    for one, other in zip(vars(never).values(), vars(always).values(), strict=True):
        np.testing.assert_array_equal(one, other[..., ::-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 5])
def test_pictures_of_other_types_and_channels(dtype: type, channels: int) -> None:
    colourless = config.Augment(saturation=0, hue=0, grayscale=0)
    full = 1 if dtype is np.float32 else np.iinfo(dtype).max
    pictures = [(np.repeat(one[:, :, :1], channels, axis=2) / 255 * full).astype(dtype) for one in sources()]
    data = config.Data(path="x").model_copy(update={"mean": (0.4,) * channels, "std": (0.2,) * channels})
    made_by = Recipe(data, colourless, config.Crops(resolutions=[SIZES], local_count=2), 0, "pretrain")
    made = ssl_views(made_by, pictures, [0, 1], SslViews(SIZES, 8, gram=True))
    assert made.global_crops.shape == made.gram_crops.shape == (2, 2, channels, 32, 32)
    assert made.local_crops.shape == (2, 2, channels, 16, 16)
    assert all(np.isfinite(views).all() for views in vars(made).values())
    alone = ssl_views(
        Recipe(data.model_copy(update={"mean": (0.4,), "std": (0.2,)}), colourless, made_by.crops, 0, "pretrain"),
        [np.ascontiguousarray(one[:, :, -1:]) for one in pictures],
        [0, 1],
        SslViews(SIZES, 8, gram=True),
    )
    np.testing.assert_allclose(made.global_crops[:, :, -1:], alone.global_crops, atol=1e-4)
    np.testing.assert_allclose(made.local_crops[:, :, -1:], alone.local_crops, atol=1e-4)


def test_resolutions_are_drawn_by_their_ratio_one_a_step() -> None:
    sizes = [config.Resolution(global_size=s, local_size=16, ratio=r) for s, r in ((32, 0.3), (48, 0.6), (64, 0.1))]
    crops_ = config.Crops(resolutions=sizes)
    drawn = [resolution_at(0, "highres", crops_, clock).global_size for clock in range(2000)]
    assert [drawn.count(s) / 2000 for s in (32, 48, 64)] == pytest.approx([0.3, 0.6, 0.1], abs=0.04)
    assert drawn == [resolution_at(0, "highres", crops_, clock).global_size for clock in range(2000)]


def test_the_released_blur_has_its_probability_inverted() -> None:
    released = as_released(config.Augment())
    assert (released.blur_global_1, released.blur_global_2, released.blur_local) == (0.0, 0.9, 0.5)
    assert released.solarize_global_2 == config.Augment().solarize_global_2
