"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from model import config
from model.config import Schedule, constant
from model.schedules import learning_rate, lr_scale, value


def values(schedule, steps):
    return [value(schedule, step, steps) for step in range(steps)]


def test_a_number_stays_the_same():
    assert values(constant(0.1), 7) == [0.1] * 7


def test_linear_warm_up_then_cosine_as_dinov3_writes_it():
    found = values(Schedule(start=0.0, peak=2.0, end=0.5, warmup_steps=4), 12)
    warm = np.linspace(0.0, 2.0, 4, endpoint=False)
    cosine = 0.5 + 0.5 * (2.0 - 0.5) * (1 + np.cos(np.linspace(0, np.pi, 8)))
    np.testing.assert_allclose(found, [*warm, *cosine], rtol=1e-12)
    assert found[4] == 2.0
    assert found[-1] == 0.5


def test_half_cosine_warm_up_then_constant():
    found = values(Schedule(start=1.0, peak=0.5, warmup_steps=10, warmup="cosine"), 15)
    np.testing.assert_allclose(found[:10], [0.75 + 0.25 * math.cos(math.pi * i / 10) for i in range(10)])
    assert found[10:] == [0.5] * 5


def test_linear_decay():
    found = values(Schedule(peak=1.0, end=0.0, decay="linear"), 5)
    assert found == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_without_start_the_warm_up_is_flat():
    assert values(Schedule(peak=1.0, end=0.0, warmup_steps=3), 4)[:3] == [1.0] * 3


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(1, 0, [3.0]), (2, 1, [0.0, 3.0]), (2, 4, [0.0, 0.75])])
def test_short_phases(steps, warmup, expected):
    assert values(Schedule(start=0.0, peak=3.0, end=1.0, warmup_steps=warmup), steps) == expected


def test_past_the_last_step_the_last_value_holds():
    schedule = Schedule(peak=1.0, end=0.25)
    assert value(schedule, 10, 10) == value(schedule, 9, 10) == 0.25


def test_before_the_first_step_there_is_nothing():
    with pytest.raises(ValueError, match="begins at step 0"):
        value(constant(1.0), -1, 10)


def test_learning_rate_scaling():
    assert lr_scale("none", 4096) == 1.0
    assert lr_scale("linear_256", 1024) == 4.0
    assert lr_scale("sqrt_wrt_1024", 1024) == 4.0
    assert lr_scale("sqrt_wrt_1024", 4096) == 8.0


def v1(base, final, steps, warmup=0, start=0.0):
    """DINO's `cosine_scheduler`."""
    warm = np.linspace(start, base, warmup) if warmup else np.array([])
    left = np.arange(steps - warmup)
    return np.concatenate([warm, final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))])


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_v1s_form_starts_at_the_base_twice_and_does_not_reach_the_end(warmup):
    found = values(Schedule(start=0.0, peak=2.0, end=0.5, warmup_steps=warmup, form="v1"), 12)
    np.testing.assert_allclose(found, v1(2.0, 0.5, 12, warmup), rtol=1e-12, atol=1e-15)
    assert found[-1] > 0.5


def test_v1s_teacher_temperature_moves_once_an_epoch():
    schedule = Schedule(start=0.04, peak=0.07, warmup_steps=9, hold_steps=3, form="v1")
    by_epoch = [*np.linspace(0.04, 0.07, 3), 0.07, 0.07]
    np.testing.assert_allclose(values(schedule, 14), np.repeat(by_epoch, 3)[:14], rtol=1e-12)
    with pytest.raises(ValueError, match="hold_steps goes with `form: v1`"):
        Schedule(peak=1.0, hold_steps=3)


@pytest.mark.parametrize(("form", "scaled"), [("v1", (4e-3, 1e-6)), ("v2", (4e-3, 4e-6))])
def test_the_batch_scales_the_peak_and_in_v2_the_end_too(form, scaled):
    lr = {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup_steps": 2, "form": form}
    settings = config.read(config.Optim, {"batch_size": 1024, "group_size": 8, "lr": lr, "lr_scaling": "linear_256"})
    assert learning_rate(settings, 2, 12) == pytest.approx(scaled[0])
    assert learning_rate(settings, 11, 12) == pytest.approx(
        scaled[1] if form == "v2" else v1(scaled[0], scaled[1], 12, 2)[-1]
    )
