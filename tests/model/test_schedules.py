"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from model.config import Schedule, constant
from model.schedules import lr_scale, value


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
    assert lr_scale("sqrt_wrt_1024", 1024) == 4.0
    assert lr_scale("sqrt_wrt_1024", 4096) == 8.0
