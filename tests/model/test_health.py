"""Collapse metrics on cases whose value is known, and the same for one process as for two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model import health
from model.health import Observed
from tests.model.test_parallel import run_ranks


def test_effective_rank_counts_directions() -> None:
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert health.effective_rank(axes) == pytest.approx(8.0)
    assert health.effective_rank(axes[:, :1] * torch.ones(1, 8)) == pytest.approx(1.0)


def test_effective_rank_of_a_collapsed_batch_is_one() -> None:
    assert health.effective_rank(torch.full((16, 8), 0.3)) == 1.0


def test_effective_rank_of_features_that_are_not_finite_is_none() -> None:
    features = torch.ones(16, 8)
    features[3, 4] = math.inf
    assert math.isnan(health.effective_rank(features))
    assert health.effective_rank(torch.zeros(16, 8)) == 1.0


def test_assignment() -> None:
    uniform, one, each = torch.full((4, 4), 0.25), torch.eye(4)[[2, 2, 2, 2]], torch.eye(4)
    assert health.assignment(uniform) == pytest.approx((math.log(4), 1.0))
    assert health.assignment(one) == pytest.approx((0.0, 0.25))
    assert health.assignment(each) == pytest.approx((0.0, 1.0))


def test_only_what_an_objective_shows_is_measured() -> None:
    class Shows:
        def observe(self, targets: Any) -> Observed:
            return Observed(features=targets)

    assert health.measure(object(), None) == {}
    assert health.measure(Shows(), torch.eye(4)).keys() == {"health/effective_rank"}


TWO_RANKS = """
import torch
from model import health, parallel
parallel.join("gloo")
torch.manual_seed(0)
features, rows = torch.randn(12, 6), torch.randn(12, 5).softmax(-1)
own = slice(0, 4) if parallel.rank() == 0 else slice(4, 12)
shared = health.effective_rank(features[own]), *health.assignment(rows[own])
parallel.leave()
alone = health.effective_rank(features), *health.assignment(rows)
torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone))
"""


@pytest.mark.jobs
def test_two_ranks_measure_the_global_batch(tmp_path: Path) -> None:
    for result in run_ranks(TWO_RANKS, 2):
        assert result.returncode == 0, result.stderr


def seen(assignments: torch.Tensor, **others: torch.Tensor) -> dict[str, float]:
    class Shows:
        def observe(self, targets: Any) -> Observed:
            return Observed(assignments=targets, **others)

    return health.measure(Shows(), assignments, cross_entropy=2.0)


def test_a_healthy_teacher_is_not_called_collapsed() -> None:
    features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    sharp = torch.eye(16).repeat(4, 1) * 0.9 + 0.1 / 16
    assert health.collapse(seen(sharp, features=features, closeness=torch.full((64,), 0.5))) == ""
    assert health.collapse({}) == ""


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1.0, 0.0, 0.0, 0.0], "one dimension took over"),
        ([0.25, 0.25, 0.25, 0.25], "it went flat"),
        ([0.5, 0.5, 0.0, 0.0], "every image gets the same prototypes"),
    ],
)
def test_which_way_assignments_collapsed(row: list[float], words: str) -> None:
    assert words in health.collapse(seen(torch.tensor([row] * 32)))


def test_collapsed_features_and_patches_are_named() -> None:
    healthy = torch.eye(16).repeat(4, 1)
    line = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 8)
    assert "features vary along one direction" in health.collapse(seen(healthy, features=line))
    assert "patches repeat the CLS" in health.collapse(seen(healthy, closeness=torch.ones(64)))


def test_kl_is_cross_entropy_less_the_targets_entropy() -> None:
    uniform = torch.full((4, 4), 0.25)
    assert seen(uniform, targets=uniform)["health/kl"] == pytest.approx(2.0 - math.log(4))


def test_two_prototypes_of_many_are_a_collapse_too() -> None:
    two = torch.eye(256)[[7, 9]].repeat(16, 1)
    assert "one dimension took over" in health.collapse(seen(two))
    assert "2.0 prototypes are in use" in health.collapse(seen(two))
