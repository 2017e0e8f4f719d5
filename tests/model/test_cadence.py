"""When to save: fixed steps, steps that others name, and Daly's interval."""

from __future__ import annotations

import math

import pytest

from model.cadence import Measured, choose, daly, gives_up, is_due
from model.config import Checkpoints


def test_fixed_steps() -> None:
    every = Checkpoints(every=4)
    assert [step for step in range(1, 13) if is_due(every, step, None, wanted=step == 6)] == [4, 8, 12]


def test_auto_saves_ever_more_rarely_until_it_knows_and_where_somebody_asked() -> None:
    auto = Checkpoints(every="auto", node_mtbf_hours=100.0)
    assert [step for step in range(1, 170) if is_due(auto, step, None, wanted=step == 33)] == [10, 20, 33, 40, 80, 160]
    assert [step for step in range(1, 30) if is_due(auto, step, 7, wanted=step == 10)] == [7, 10, 14, 21, 28]


def lost(interval: float, cost: float, mtbf: float) -> float:
    """Daly's model: the time that a unit of work takes (equation 20, without restarts)."""
    return mtbf * math.expm1((interval + cost) / mtbf) / interval


@pytest.mark.parametrize(("cost", "mtbf"), [(1.0, 1e5), (30.0, 3600.0), (300.0, 3600.0)])
def test_dalys_interval_is_where_least_time_is_lost(cost: float, mtbf: float) -> None:
    best = daly(cost, mtbf)
    least = min(lost(best * factor / 1000, cost, mtbf) for factor in range(500, 2000))
    assert lost(best, cost, mtbf) == pytest.approx(least, rel=2e-4)
    assert best == pytest.approx(math.sqrt(2 * cost * mtbf), rel=0.2)  # Young's


def test_saves_that_cost_more_than_failures() -> None:
    assert daly(200.0, 100.0) == 100.0


def test_the_choice_says_why() -> None:
    steps, why = choose(Measured(stall=0.5, save=20.0, step=2.0), node_mtbf_hours=6300.0, nodes=32)
    assert steps == math.ceil(daly(0.5, 6300 * 3600 / 32) / 2)
    assert "Daly" in why
    assert "every 196.9 h (6,300 h a node, 32 of them)" in why
    assert "apart" not in why


def test_saves_are_never_chosen_so_close_that_they_meet() -> None:
    steps, why = choose(Measured(stall=0.001, save=600.0, step=1.0), node_mtbf_hours=10.0, nodes=10)
    assert steps == 900
    assert "begin at least 900 s apart" in why


@pytest.mark.parametrize(
    ("rest", "whole", "left", "gives"),
    [(10, 20, 100, False), (10, 20, 30, True), (10, 20, 15, False), (10, 20, 5, False), (10, 20, math.inf, False)],
)
def test_the_save_under_way_makes_way_only_where_that_saves_steps(
    rest: float, whole: float, left: float, gives: bool
) -> None:
    assert gives_up(rest, whole, left) is gives
