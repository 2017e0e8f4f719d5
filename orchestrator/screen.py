"""What a run shows while somebody watches it: bars on a terminal, plain lines elsewhere.

`Follower` turns the run's log and progress records into a `View` and notes; a screen only draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from model.contract import Cause, Step, now
from orchestrator import progress, status
from orchestrator.decide import NOT_SEEN
from orchestrator.launchers.base import Observation
from orchestrator.overview import duration, queued
from orchestrator.problems import listed
from orchestrator.state import AttemptState, State

RATE_STEPS = 50
"""The ETA is from the pace of the last so many steps: throughput drifts."""

LINE_SECONDS = 5.0
BAR, LEAST_BAR = 24, 10  # characters; figures give way where the bar would get shorter
CLOCK = 8  # characters that the time since the phase began takes, with the space before it
WIDE = 100  # columns from which there is room for it
SAME_LINE_SECONDS = 30.0  # nothing new is said again this often: it is alive


@dataclass(frozen=True)
class View:
    """Where a run is now. `eta`: seconds to the end of the phase at the present pace. `before`: what the attempt does
    before its first step: wait in a cluster's queue (or for the cluster's answer), or look at the images."""

    stage: str
    number: int
    stages: int
    attempt: int = 0
    step: int = 0
    steps: int = 0  # 0: not known
    loss: float | None = None
    images_per_second: float | None = None
    eta: float | None = None
    before: str = ""


@dataclass
class Follower:
    """Reads what is new since it last looked. It keeps nothing that the run directory does not hold."""

    run_dir: str
    chunks: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    recent: list[Step] = field(default_factory=list)
    placed: set[int] = field(default_factory=set)
    view: View | None = None

    def begin(self, run: State) -> None:
        """Pass over what happened before: a person who comes back wants to see what is new."""
        self.ended = {attempt.number for attempt in run.attempts if attempt.end}
        self.chunks = {number: progress.last_chunk(self.run_dir, number) for number in sorted(self.ended)}

    def look(self, run: State, launch: Observation = NOT_SEEN) -> list[str]:
        """The notes since the last look; `view` is where the run is now. launch: of the live attempt, as last seen."""
        notes: list[str] = []
        stage = run.next_stage or run.stages[-1]
        number = run.stages.index(stage) + 1
        if self.view is None or self.view.stage != stage.name:
            reached = status.reached(self.run_dir, run, stage) or 0
            self.view = View(stage.name, number, len(run.stages), step=reached, steps=stage.last or 0)
        for attempt in run.attempts:
            if attempt.number not in self.ended:
                notes += self._attempt(attempt)
        before = queued(launch.state, launch.detail, launch.starts_at, now()) if run.live and launch != NOT_SEEN else ""
        if run.live and not before and not self.recent:
            before = progress.looked(self.run_dir, run.live.number)
        self.view = replace(self.view, before=before)
        if run.live and launch.nodes and run.live.number not in self.placed:
            self.placed.add(run.live.number)
            notes.append(f"attempt {run.live.number} runs on {listed(launch.nodes)}")
        return notes

    def _attempt(self, attempt: AttemptState) -> list[str]:
        assert self.view is not None
        notes = []
        mine = self.view.stage == attempt.phase
        if mine and self.view.attempt != attempt.number:
            self.view = replace(self.view, attempt=attempt.number)
            self.recent.clear()
        for chunk, steps in progress.since(self.run_dir, attempt.number, self.chunks.get(attempt.number, -1)):
            self.chunks[attempt.number] = chunk
            notes += [f"{attempt.phase}: {step.note}" for step in steps if step.note]
            if mine:
                self._steps(steps)
        if attempt.end:
            self.ended.add(attempt.number)
            notes += _ended(attempt)
        return notes

    def _steps(self, steps: list[Step]) -> None:
        assert self.view is not None
        self.recent = [*self.recent, *steps][-RATE_STEPS:]
        last = self.recent[-1]
        losses = [step.metrics["loss"] for step in self.recent if "loss" in step.metrics]
        self.view = replace(
            self.view,
            step=last.step,
            steps=last.steps,
            loss=losses[-1] if losses else self.view.loss,
            images_per_second=last.images_per_second,
            eta=_eta(self.recent),
        )


def _ended(attempt: AttemptState) -> list[str]:
    end = attempt.end
    if end is None:
        return []
    if end.cause is Cause.DONE:
        return [f"{attempt.phase}: {end.message}"]
    return [f"attempt {attempt.number} of {attempt.phase} ended: {end.cause.value}: {end.message}"]


def _eta(recent: list[Step]) -> float | None:
    first, last = recent[0], recent[-1]
    if last.step <= first.step:
        return None
    return (last.steps - last.step) * (last.time - first.time) / (last.step - first.step)


def line(view: View) -> str:
    """The view in one plain line."""
    of = f"/{view.steps}" if view.steps else ""
    parts = [f"phase {view.stage} ({view.number} of {view.stages})", f"step {view.step}{of}"]
    if view.before:
        parts.append(view.before)
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    if view.images_per_second:
        parts.append(f"{view.images_per_second:.1f} images/s")
    if view.eta is not None:
        parts.append(f"ETA {duration(view.eta)}")
    return ", ".join([*parts, f"attempt {view.attempt}"] if view.attempt else parts)


# --- screens ----------------------------------------------------------------------------------------------------------


class Screen(Protocol):
    """Shows a view over the one before, and notes for good. A context manager, so that a terminal is left in order."""

    def show(self, view: View, now: float) -> None: ...

    def note(self, text: str, style: str = "") -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def screen(console: Console) -> Screen:
    return Bars(console) if console.is_terminal else Lines(console)


class Lines:
    """For a pipe or a log: a line every few seconds, notes at once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[float, str] | None = None

    def show(self, view: View, now: float) -> None:
        text = line(view)
        at, before = self._shown or (-SAME_LINE_SECONDS, "")
        if now - at >= (SAME_LINE_SECONDS if text == before else LINE_SECONDS):
            self._print(text)
            self._shown = now, text

    def note(self, text: str, style: str = "") -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        # Whoever reads a pipe reads it now, and no line of it is folded.
        print(text, file=self._console.file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Bars:
    """For a terminal: a bar a phase, the finished ones stay above."""

    def __init__(self, console: Console) -> None:
        self._clock = console.width >= WIDE
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(BAR),
            TextColumn("{task.fields[figures]}"),
            *([TimeElapsedColumn()] if self._clock else []),
            console=console,
            refresh_per_second=4,
        )
        self._stage = ""
        self._task: TaskID | None = None

    def show(self, view: View, now: float) -> None:
        name = f"{view.stage} ({view.number} of {view.stages})"
        if self._task is None or self._stage != view.stage:
            if self._task is not None:
                self._finish(self._task)
            self._task, self._stage = self._progress.add_task(name, total=None, figures=""), view.stage
        room = self._progress.console.width - len(name) - LEAST_BAR - 2 - (CLOCK if self._clock else 0)
        figures = _figures(view, room)
        self._progress.update(self._task, completed=view.step, total=view.steps or None, figures=figures)

    def _finish(self, task: TaskID) -> None:
        total = self._progress.tasks[task].total
        self._progress.update(task, total=total or 1, completed=total or 1)

    def note(self, text: str, style: str = "") -> None:
        self._progress.console.print(Text(text, style=style))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _figures(view: View, room: int) -> str:
    """The figures that fit in `room` characters: the step always, then by what a person asks first."""
    parts = [f"{view.step}/{view.steps}" if view.steps else "starting"]
    if view.before:  # what a person wants to know before all else, cut where there is no room
        left = room - len(parts[0]) - 2
        return f"{parts[0]}  {view.before if len(view.before) <= left else view.before[: max(left - 3, 0)] + '...'}"
    if view.loss is not None:
        parts.append(f"loss {view.loss:.3f}")
    if view.images_per_second:
        parts.append(f"{view.images_per_second:.0f} images/s")
    if view.eta is not None:
        parts.append(f"ETA {duration(view.eta)}")
    if view.attempt > 1:
        parts.append(f"attempt {view.attempt}")
    for least in ("attempt", "images/s", "loss", "ETA"):
        if len("  ".join(parts)) > room:
            parts = [part for part in parts if least not in part]
    return "  ".join(parts)
