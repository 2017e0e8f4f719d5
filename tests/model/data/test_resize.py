from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from model.data.images import Picture
from model.data.resize import square, unit


def picture(channels: int = 3, dtype: type = np.uint8) -> Picture:
    rng = np.random.default_rng(0)
    x = rng.random((60, 90, channels), dtype=np.float32)
    return x if dtype is np.float32 else (x * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("side", [20, 75, 150])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 130])
def test_8_bits_are_resized_as_pillow_does_channel_by_channel(side: int, channels: int) -> None:
    image = picture(channels)
    found = square(image, side)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous  # or each of OpenCV's operations would copy it first
    size, bicubic = (side, side), Image.Resampling.BICUBIC
    planes = [Image.fromarray(np.ascontiguousarray(image[:, :, c])).resize(size, bicubic) for c in range(channels)]
    difference = np.abs(found.astype(int) - np.stack([np.asarray(plane) for plane in planes], axis=2))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("side", [20, 150])
def test_floats_and_16_bits_are_resized_as_pillows_floats_and_stay_in_range(side: int) -> None:
    image = picture(5, np.float32)
    image[20:40, 20:40] = 1.0
    image[24:36, 24:36] = 0.0
    found = square(image, side)
    size, bicubic = (side, side), Image.Resampling.BICUBIC
    planes = [Image.fromarray(np.ascontiguousarray(image[:, :, c])).resize(size, bicubic) for c in range(5)]
    np.testing.assert_allclose(found, np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 1), atol=1e-5)
    in_16_bits = square((image * 65535).round().astype(np.uint16), side)
    assert in_16_bits.dtype == np.float32
    np.testing.assert_allclose(in_16_bits, found, atol=2e-5)


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_every_type_has_its_full_range_in_unit(dtype: type, full: float) -> None:
    x = unit(np.array([[[0], [full]]], dtype))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.ravel(), [0, 1], atol=1e-7)


def test_a_square_of_that_side_is_left_as_it_is() -> None:
    image = picture()[:60, :60]
    np.testing.assert_array_equal(square(image, 60), image)
