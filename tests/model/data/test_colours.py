"""Each operation against torchvision's own, given the same parameters; it is imported by tests only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from model import config
from model.data import colours
from model.data.colours import Colours, Pixels, distort, draw_colours

CLOSE = 5e-4  # torchvision writes 0.2989 where the standard (BT.601) has 0.299


def crop(side: int = 32, channels: int = 3) -> Pixels:
    """A smooth crop [side, side, C] in [0, 1], with some exact greys, blacks and whites."""
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.random((1, channels, 8, 8), dtype=np.float32))
    x = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0].permute(1, 2, 0).numpy().copy()
    x[:2] = 0.5
    x[2:4] = np.resize([0.0, 1.0], (side, 1))
    return x


def planes(x: Pixels) -> Tensor:
    return torch.from_numpy(x).permute(2, 0, 1)


REFERENCES: list[tuple[Colours, Callable[[Tensor], Tensor]]] = [
    (Colours(jitter=(("brightness", 1.4),)), lambda x: tv.adjust_brightness(x, 1.4)),
    (Colours(jitter=(("contrast", 0.6),)), lambda x: tv.adjust_contrast(x, 0.6)),
    (Colours(jitter=(("contrast", 1.4),)), lambda x: tv.adjust_contrast(x, 1.4)),
    (Colours(jitter=(("saturation", 0.8),)), lambda x: tv.adjust_saturation(x, 0.8)),
    (Colours(jitter=(("saturation", 1.2),)), lambda x: tv.adjust_saturation(x, 1.2)),
    (Colours(jitter=(("hue", 0.1),)), lambda x: tv.adjust_hue(x, 0.1)),
    (Colours(jitter=(("hue", -0.07),)), lambda x: tv.adjust_hue(x, -0.07)),
    (Colours(jitter=(("hue", 0.5),)), lambda x: tv.adjust_hue(x, 0.5)),
    (Colours(jitter=(("hue", -0.5),)), lambda x: tv.adjust_hue(x, -0.5)),
    (Colours(grey=True), lambda x: tv.rgb_to_grayscale(x, 3)),
    (Colours(blur_sigma=0.1), lambda x: tv.gaussian_blur(x, [9, 9], [0.1, 0.1])),
    (Colours(blur_sigma=1.7), lambda x: tv.gaussian_blur(x, [9, 9], [1.7, 1.7])),
    (Colours(solarize=True), lambda x: tv.solarize(x, 128 / 255)),
]


@pytest.mark.parametrize(("done", "reference"), REFERENCES, ids=[str(done) for done, _ in REFERENCES])
def test_each_operation_is_torchvisions(done: Colours, reference: Callable[[Tensor], Tensor]) -> None:
    x = crop()
    before = x.copy()
    assert (planes(distort(x, done)) - reference(planes(x))).abs().max() < CLOSE
    np.testing.assert_array_equal(x, before)  # it may be the picture itself


def test_operations_follow_in_their_order() -> None:
    jitter = (("hue", 0.05), ("contrast", 1.3), ("brightness", 0.7), ("saturation", 1.2))
    x = planes(crop())
    expected = tv.adjust_hue(x, 0.05)
    expected = tv.adjust_brightness(tv.adjust_contrast(expected, 1.3), 0.7)
    expected = tv.solarize(tv.gaussian_blur(tv.adjust_saturation(expected, 1.2), [9, 9], [0.8, 0.8]), 128 / 255)
    found = planes(distort(crop(), Colours(jitter=jitter, blur_sigma=0.8, solarize=True)))
    near_threshold = (found - expected).abs() > CLOSE  # where 0.5 falls on one side here and on the other there
    assert near_threshold.float().mean() < 0.01


@pytest.mark.parametrize("channels", [1, 2, 4, 13, 130])
def test_channels_that_are_no_colours_are_changed_each_by_itself(channels: int) -> None:
    x = crop(channels=channels)
    done = Colours(jitter=(("contrast", 1.3), ("brightness", 0.8)), blur_sigma=1.2, solarize=True)
    found = distort(x, done)
    assert found.shape == x.shape
    for channel in range(0, channels, 9):
        alone = distort(x[:, :, channel : channel + 1].copy(), done)
        np.testing.assert_allclose(found[:, :, channel : channel + 1], alone, atol=1e-6)
    mean = x.mean(axis=(0, 1))
    np.testing.assert_allclose(colours.contrast(x, 1.3), np.clip(1.3 * x - 0.3 * mean, 0, 1), atol=1e-6)


@pytest.mark.parametrize("done", [Colours(grey=True), *(Colours(jitter=((n, 0.9),)) for n in ("saturation", "hue"))])
def test_what_needs_rgb_is_refused_for_other_channels(done: Colours) -> None:
    with pytest.raises(ValueError, match=r"need RGB, not 4 channels: set augment\.saturation"):
        distort(crop(channels=4), done)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_crop_smaller_than_the_blur_is_blurred_too(side: int) -> None:
    grey = np.full((side, side, 3), 0.4, np.float32)
    np.testing.assert_allclose(colours.blur(grey, 2.0), grey, atol=1e-6)


def drawn(augment: config.Augment, count: int = 4000) -> list[Colours]:
    rng = np.random.default_rng(0)
    return [draw_colours(rng, augment, augment.blur_global_2, augment.solarize_global_2) for _ in range(count)]


def test_probabilities_and_strengths() -> None:
    looks = drawn(config.Augment())
    assert np.mean([bool(c.jitter) for c in looks]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([c.grey for c in looks]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([c.blur_sigma is not None for c in looks]) == pytest.approx(0.1, abs=0.03)
    assert np.mean([c.solarize for c in looks]) == pytest.approx(0.2, abs=0.03)
    factors: dict[str, list[float]] = {}
    for name, factor in (pair for c in looks for pair in c.jitter):
        factors.setdefault(name, []).append(factor)
    spans = {name: (round(min(f), 2), round(max(f), 2)) for name, f in factors.items()}
    assert spans == {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    assert len({tuple(name for name, _ in c.jitter) for c in looks if c.jitter}) == 24


OFF: list[tuple[dict[str, float], Callable[[Colours], bool]]] = [
    ({"jitter": 0.0}, lambda c: bool(c.jitter)),
    ({"grayscale": 0.0}, lambda c: c.grey),
    ({"blur_global_2": 0.0}, lambda c: c.blur_sigma is not None),
    ({"solarize_global_2": 0.0}, lambda c: c.solarize),
    *(
        ({name: 0.0}, lambda c, name=name: name in dict(c.jitter))  # type: ignore[misc]
        for name in ("brightness", "contrast", "saturation", "hue")
    ),
]


@pytest.mark.parametrize(("setting", "happens"), OFF, ids=[next(iter(setting)) for setting, _ in OFF])
def test_zero_switches_an_operation_off_and_changes_no_other(
    setting: dict[str, float], happens: Callable[[Colours], bool]
) -> None:
    (name,) = setting
    with_it, without = drawn(config.Augment(), 300), drawn(config.Augment(**setting), 300)  # type: ignore[arg-type]
    assert any(map(happens, with_it))
    assert not any(map(happens, without))
    for one, other in zip(with_it, without, strict=True):
        if name != "jitter":
            assert other.jitter == tuple(pair for pair in one.jitter if pair[0] != name)
        assert name == "grayscale" or one.grey == other.grey
        assert name == "blur_global_2" or one.blur_sigma == other.blur_sigma
        assert name == "solarize_global_2" or one.solarize == other.solarize
