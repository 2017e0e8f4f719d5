"""Against torchvision's own operations, given the same parameters; it is imported by tests only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from model import config
from model.data import augment
from model.data.augment import Colours, Recipe, as_released, ssl_views
from model.data.images import Picture
from model.data.views import SslViews, resolution_at

CLOSE = 2 / 255


def crops(count: int = 3, side: int = 32) -> Tensor:
    """Smooth coloured crops [n, 3, side, side] in [0, 1], with some exact greys, blacks and whites."""
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.random((count, 3, 8, 8), dtype=np.float32))
    x = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    x[:, :, :2] = 0.5
    x[:, :, 2:4] = torch.tensor([0.0, 1.0]).repeat(side // 2)
    return x


def distorted(x: Tensor, colours: Colours) -> Tensor:
    return torch.from_numpy(augment.distort(x.numpy().copy(), [colours] * len(x)))


REFERENCES: list[tuple[Colours, Callable[[Tensor], Tensor]]] = [
    (Colours(jitter=(("brightness", 1.4),) * 4), lambda x: _repeat(tv.adjust_brightness, x, 1.4)),
    (Colours(jitter=(("contrast", 0.6),) * 4), lambda x: _repeat(tv.adjust_contrast, x, 0.6)),
    (Colours(jitter=(("saturation", 0.8),) * 4), lambda x: _repeat(tv.adjust_saturation, x, 0.8)),
    (Colours(jitter=(("hue", 0.1),) * 4), lambda x: _repeat(tv.adjust_hue, x, 0.1)),
    (Colours(jitter=(("hue", -0.07),) * 4), lambda x: _repeat(tv.adjust_hue, x, -0.07)),
    (Colours(grey=True), lambda x: tv.rgb_to_grayscale(x, 3)),
    (Colours(blur_sigma=0.1), lambda x: tv.gaussian_blur(x, [9, 9], [0.1, 0.1])),
    (Colours(blur_sigma=1.7), lambda x: tv.gaussian_blur(x, [9, 9], [1.7, 1.7])),
    (Colours(solarize=True), lambda x: tv.solarize(x, 128 / 255)),
]


def _repeat(operation: Callable[[Tensor, float], Tensor], x: Tensor, factor: float) -> Tensor:
    for _ in range(4):
        x = operation(x, factor)
    return x


@pytest.mark.parametrize(("colours", "reference"), REFERENCES, ids=[str(colours) for colours, _ in REFERENCES])
def test_each_operation_is_torchvisions(colours: Colours, reference: Callable[[Tensor], Tensor]) -> None:
    x = crops()
    assert (distorted(x, colours) - reference(x)).abs().max() < CLOSE


def test_operations_follow_in_their_order() -> None:
    jitter = (("hue", 0.05), ("contrast", 1.3), ("brightness", 0.7), ("saturation", 1.2))
    x = crops()
    expected = tv.adjust_hue(x, 0.05)
    expected = tv.adjust_brightness(tv.adjust_contrast(expected, 1.3), 0.7)
    expected = tv.solarize(tv.gaussian_blur(tv.adjust_saturation(expected, 1.2), [9, 9], [0.8, 0.8]), 128 / 255)
    found = distorted(x, Colours(jitter=jitter, blur_sigma=0.8, solarize=True))
    near_threshold = (found - expected).abs() > CLOSE  # where 0.5 falls on one side here and on the other there
    assert near_threshold.float().mean() < 0.01


def test_crops_worked_on_together_are_those_worked_on_alone() -> None:
    rng = np.random.default_rng(0)
    colours = [augment.draw_colours(rng, config.Augment(), 0.5, 0.5) for _ in range(24)]
    x = crops(24).numpy()
    together = augment.distort(x.copy(), colours)
    alone = [augment.distort(x[i : i + 1].copy(), colours[i : i + 1])[0] for i in range(24)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_cropping_is_torchvisions_on_the_same_box() -> None:
    image = sources(1, 90)[0]
    box = (10, 20, 70, 65)
    found = torch.from_numpy(augment.pixels([augment.crop(image, box, True, 32)])[0])
    source = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    cut = tv.resized_crop(source, 20, 10, 45, 60, [32, 32], tv.InterpolationMode.BICUBIC, antialias=True)
    assert (found - tv.horizontal_flip(cut).clamp(0, 1)).abs().max() < CLOSE


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


SIZES = config.Resolution(global_size=32, local_size=16)
DATA = config.Data(path="x")


def recipe(crops: config.Crops, values: config.Augment | None = None, seed: int = 0) -> Recipe:
    return Recipe(DATA, values or config.Augment(), crops, seed, "pretrain")


def sources(count: int = 2, side: int = 60) -> list[Picture]:
    return [(x.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for x in crops(count, side)]


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


def test_probabilities_and_strengths() -> None:
    rng = np.random.default_rng(0)
    drawn = [augment.draw_colours(rng, config.Augment(), 0.1, 0.2) for _ in range(4000)]
    assert np.mean([bool(c.jitter) for c in drawn]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([c.grey for c in drawn]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([c.blur_sigma is not None for c in drawn]) == pytest.approx(0.1, abs=0.03)
    assert np.mean([c.solarize for c in drawn]) == pytest.approx(0.2, abs=0.03)
    factors: dict[str, list[float]] = {}
    for name, factor in (pair for c in drawn for pair in c.jitter):
        factors.setdefault(name, []).append(factor)
    spans = {name: (round(min(f), 2), round(max(f), 2)) for name, f in factors.items()}
    assert spans == {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    assert len({tuple(name for name, _ in c.jitter) for c in drawn if c.jitter}) == 24


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
