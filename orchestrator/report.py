"""The table at the end of a run: trained beside untrained and trivial baselines, and plainly what trained doesn't beat.

`model.evaluate` writes it (`contract.REPORT_FILE`); this reads it and draws it. A score is better when higher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from model import contract, storage

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Interval = tuple[float, float]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One score. `interval` is that of the difference; an interval is 95% by paired bootstrap over duplicate groups."""

    score: str
    unit: str
    trained: float
    untrained: float
    difference: float
    interval: Interval
    trained_interval: Interval
    untrained_interval: Interval
    baselines: dict[str, float]
    beats_untrained: bool
    note: str = ""


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A score that these images did not allow, and why."""

    score: str
    why: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The report as stored. Fields that a later evaluation adds are passed over: nobody decides by this file."""

    split: str
    seed: int
    n_images: int
    n_groups: int
    rows: list[Row]
    left_out: list[LeftOut] = []
    pictures: list[str] = []  # relative to the run directory


def read(run_dir: str) -> Report | None:
    """The run's report; None before there is one. Raises contract.ContractError naming the file if it is torn."""
    path = f"{run_dir}/{contract.REPORT_FILE}"
    try:
        data = storage.read(path)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise contract.ContractError(f"{path}: not a report that this version of dinoctl reads: {error}") from error


def render(report: Report) -> RenderableType:
    """The table, what trained does not beat, and what was left out."""
    from rich.console import Group  # here, as `dinoctl status` of many runs reads no report and draws none
    from rich.text import Text

    lines = [Text(line, style="yellow") for line in not_beaten(report)]
    left_out = [Text(f"Left out: {gone.score} ({gone.why}).") for gone in report.left_out]
    return Group(_table(report), *lines, *left_out)


def _table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{report.n_images} images ({report.n_groups} groups of near-duplicates) of the {report.split} split, "
        f"seed {report.seed}; in brackets 95% intervals",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("score", no_wrap=True)
    for name in ("trained", "untrained", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("baselines")
    table.add_column("beats untrained")
    for row in report.rows:
        table.add_row(
            f"{row.score} ({row.unit})" if row.unit else row.score,
            _number(row.trained, row.trained_interval),
            _number(row.untrained, row.untrained_interval),
            _number(row.difference, row.interval, signed=True),
            ", ".join(f"{name} {value:.1f}" for name, value in row.baselines.items()),
            Text("yes", style="green") if row.beats_untrained else Text("no", style="yellow"),
        )
    return table


def _number(value: float, interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, high = interval
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def not_beaten(report: Report) -> list[str]:
    """One sentence for each thing that the trained network does not beat, or not beyond chance."""
    return [line for row in report.rows for line in _row_not_beaten(row)]


def _row_not_beaten(row: Row) -> Iterator[str]:
    note = f" {row.note}" if row.note else ""
    if not row.beats_untrained:
        low, high = row.interval
        yield (
            f"{row.score}: trained does not beat untrained "
            f"({row.trained:.1f} against {row.untrained:.1f}, difference between {low:+.1f} and {high:+.1f}).{note}"
        )
    for name, value in row.baselines.items():
        if row.trained <= value:
            yield f"{row.score}: trained ({row.trained:.1f}) does not beat {name} ({value:.1f})."
        elif row.trained_interval[0] <= value:
            low, high = row.trained_interval
            yield (
                f"{row.score}: trained ({row.trained:.1f}) is above {name} ({value:.1f}), "
                f"which its interval [{low:.1f}, {high:.1f}] does not exclude."
            )
