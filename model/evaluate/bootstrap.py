"""Confidence intervals: held-out images are resampled by near-duplicate group, both networks on the same resample.

The percentile bootstrap (Efron and Tibshirani 1993, chapter 13), paired, with groups as the unit of resampling: ten
recoloured copies of one drawing are one observation, not ten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model import draws
from model.evaluate.scores import Counts, Ints

Score = Callable[[Counts], float]
COVERAGE = 95.0


@dataclass(frozen=True)
class Interval:
    """A score with its 95% confidence interval."""

    value: float
    low: float
    high: float


def _resampled(counts: Counts, groups: Ints, resamples: int, seed: int) -> Counts:
    """Column sums of each resample: [resamples, k]. The same (groups, seed) gives the same resamples for any counts."""
    _, member = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(member.max()) + 1, counts.shape[1]))
    np.add.at(sums, member, counts)
    rng = draws.generator(seed, "bootstrap")
    times = rng.multinomial(len(sums), np.full(len(sums), 1.0 / len(sums)), size=resamples)
    return np.asarray(times @ sums, dtype=np.float64)


def _interval(value: float, values: list[float]) -> Interval:
    low, high = np.percentile(values, [(100.0 - COVERAGE) / 2, (100.0 + COVERAGE) / 2])
    return Interval(value, float(low), float(high))


def interval(counts: Counts, groups: Ints, score: Score, resamples: int, seed: int) -> Interval:
    """The score of `counts` [n, k] with its interval; `groups` [n]."""
    return _interval(score(counts.sum(axis=0)), [score(row) for row in _resampled(counts, groups, resamples, seed)])


def difference(a: Counts, b: Counts, groups: Ints, score: Score, resamples: int, seed: int) -> Interval:
    """The score of `a` less that of `b` on the same images, with the interval of the paired difference."""
    pairs = zip(_resampled(a, groups, resamples, seed), _resampled(b, groups, resamples, seed), strict=True)
    return _interval(score(a.sum(axis=0)) - score(b.sum(axis=0)), [score(x) - score(y) for x, y in pairs])
