"""The table at the end, as data: each score of the trained and the untrained network beside trivial baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from model.contract import Record
from model.evaluate import bootstrap
from model.evaluate.bootstrap import Interval
from model.evaluate.scores import Counts, Ints


class Row(Record, frozen=True):
    """One score, in `unit`; intervals are 95% ones, `interval` that of the paired difference."""

    score: str
    unit: str
    trained: float
    untrained: float
    difference: float
    interval: tuple[float, float]
    trained_interval: tuple[float, float]
    untrained_interval: tuple[float, float]
    baselines: dict[str, float]
    beats_untrained: bool  # the whole interval of the difference lies above 0
    note: str


class LeftOut(Record, frozen=True):
    """A score that these images do not allow, and why."""

    score: str
    why: str


class Report(Record, frozen=True):
    """`report/report.json`."""

    run: str
    seed: int
    split: str
    n_images: int
    n_groups: int
    checkpoints: dict[str, str]
    rows: list[Row]
    left_out: list[LeftOut]
    pictures: list[str]  # relative to the run directory


@dataclass(frozen=True)
class Scored:
    """One score as counts [n, k] per held-out image; `groups` [n] are the near-duplicates to resample by."""

    name: str
    trained: Counts
    untrained: Counts
    baselines: Mapping[str, Counts]
    groups: Ints
    score: Callable[[Counts], float]
    note: str


def row(scored: Scored, resamples: int, seed: int) -> Row:
    """The row of one score, with its intervals."""

    def alone(counts: Counts) -> Interval:
        return bootstrap.interval(counts, scored.groups, scored.score, resamples, seed)

    trained, untrained = alone(scored.trained), alone(scored.untrained)
    gain = bootstrap.difference(scored.trained, scored.untrained, scored.groups, scored.score, resamples, seed)
    return Row(
        score=scored.name,
        unit="%",
        trained=trained.value,
        untrained=untrained.value,
        difference=gain.value,
        interval=(gain.low, gain.high),
        trained_interval=(trained.low, trained.high),
        untrained_interval=(untrained.low, untrained.high),
        baselines={name: scored.score(np.sum(counts, axis=0)) for name, counts in scored.baselines.items()},
        beats_untrained=gain.low > 0.0,
        note=scored.note,
    )


def encode(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2)
