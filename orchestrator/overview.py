"""The table of all runs, as plain text. Pure: no files, no clock.

Without rich, as importing that would take as long as all the rest of `dinoctl status`.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.status import Summary, Watch

HEAD = ("run", "status", "phase", "step", "attempt", "watched by", "note")


def runs(summaries: Sequence[Summary], now: float) -> str:
    """One line a run, under a head; nothing is cut or folded."""
    rows = [HEAD, *(_row(run, now) for run in summaries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def _row(run: Summary, now: float) -> tuple[str, ...]:
    where = f"{run.stage} ({run.number} of {run.stages})" if run.stages else ""
    attempt = str(run.attempt or "")
    return (run.run, run.status, where, steps(run.step, run.steps), attempt, watched(run.watch, now), _note(run))


def _note(run: Summary) -> str:
    """Why it stands, in a word, and the command that goes on; `status RUN` has the whole story."""
    why = run.cause.value if run.cause and run.status != "done" else ""
    return ": ".join(part for part in (why, run.advice) if part)


def steps(step: int | None, of: int | None) -> str:
    """`120/500`; empty for the evaluation, which has none."""
    return "" if of is None else f"{step or 0}/{of}"


def watched(watch: Watch | None, now: float) -> str:
    """Who keeps a run going and since when; empty once nobody needs to."""
    if watch is None:
        return ""
    job = f"; {watch.job}" if watch.job else ""
    if watch.pid is None:
        return (f"nobody for {duration(now - watch.since)}" if watch.since else "nobody") + job
    return f"{watch.host}/{watch.pid} for {duration(now - (watch.since or now))}{job}"


def queued(state: str, detail: str, starts_at: float | None, now: float) -> str:
    """Of an attempt that a cluster has: why it does not run yet and when it is expected to; empty once it runs."""
    more = f": {detail}" if detail else ""
    if state == "unknown":
        return f"its launcher does not answer{more}"
    if state != "pending":
        return ""
    start = f"; expected to start in {duration(starts_at - now)}" if starts_at and starts_at > now else ""
    return f"in the queue{more}{start}"


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `2 h 05 min`, `3 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """`12 B`, `3.4 MB`, `1.35 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
