"""All live runs of a folder kept going by one process, with one question to each cluster however many runs it has.

`pass_over` is one look at all of them; `follow` (`dinoctl tick` without RUN) looks until each can be left, `keep`
(`dinoctl watch` without RUN) until it is told to go. A run that cannot be read or that its launcher fails is said, and
the others go on.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec

from model import storage
from model.contract import ContractError, hostname, now
from model.storage import StoreError
from orchestrator import control, folded, store
from orchestrator.control import Controller, LauncherFor, TickResult
from orchestrator.decide import NOT_SEEN, Rest
from orchestrator.launchers.base import Launcher, LaunchError, LaunchState, Observation, Query
from orchestrator.perform import ControlError
from orchestrator.state import IllegalEvent, State

FAILURES = (ContractError, store.LogError, IllegalEvent, StoreError, LaunchError, ControlError)
"""What is wrong with one run, or with its cluster."""


@dataclass(frozen=True)
class Keeper:
    """One process that ticks all runs of a folder. `controllers`: by run directory, once a run was found live."""

    runs: str
    me: Controller  # of the folder: its heartbeat lies there, and it ticks no run
    controllers: dict[str, Controller] = field(default_factory=dict)

    def of(self, run_dir: str) -> Controller:
        if run_dir not in self.controllers:
            self.controllers[run_dir] = replace(self.me, run_dir=run_dir, missing={}, uncleared=[])
        return self.controllers[run_dir]

    def is_done_with(self, state: State, run_dir: str) -> bool:
        """Whether a run is over, and so is what it had on its cluster."""
        known = self.controllers.get(run_dir)
        return state.status != "running" and not (known and known.uncleared)


@dataclass(frozen=True)
class Pass:
    """By run directory: what a look at each live run led to, and what is wrong with those that could not be ticked."""

    results: dict[str, TickResult]
    errors: dict[str, str]


@dataclass
class _Group:
    """The runs of one cluster profile."""

    launcher: Launcher
    runs: list[tuple[str, State, Query | None]] = field(default_factory=list)

    def observe(self) -> list[Observation]:
        """An answer a run, from one question to the cluster."""
        queries = [query for _, _, query in self.runs if query is not None]
        answers = iter(self.launcher.observe(queries) if queries else [])
        return [NOT_SEEN if query is None else next(answers) for _, _, query in self.runs]


def keeper(runs: str, launcher_for: LauncherFor, *, command: str, every: float) -> Keeper:
    runs = control.absolute(runs)
    return Keeper(runs, control.controller(f"{runs}/{store.FOLDER}", launcher_for, command=command, every=every))


def pass_over(this: Keeper, clock: float, idle: frozenset[str] = frozenset()) -> Pass:
    """Tick every live run of the folder once, and those whose cluster did not take away what is over. idle: those to
    leave as they are."""
    store.heartbeat(this.me.run_dir, msgspec.structs.replace(this.me.me, seen_at=clock))
    results: dict[str, TickResult] = {}
    errors: dict[str, str] = {}
    for group in _groups(this, idle, errors):
        for (run_dir, state, _), launch in zip(group.runs, group.observe(), strict=True):
            try:
                results[run_dir] = control.act(this.of(run_dir), state, group.launcher, launch, clock)
            except FAILURES as error:
                errors[run_dir] = str(error)
    uncleared = {run_dir: said for run_dir, known in this.controllers.items() for said in known.uncleared}
    return Pass(results, uncleared | errors)


def _groups(this: Keeper, idle: frozenset[str], errors: dict[str, str]) -> list[_Group]:
    """The runs to tick by cluster profile. What is wrong with a run goes into `errors`."""
    groups: dict[bytes, _Group] = {}
    for run_dir in (f"{this.runs}/{name}" for name in storage.names(this.runs)):
        if run_dir in idle:
            continue
        try:
            state = folded.load(run_dir)
            if state is None or this.is_done_with(state, run_dir) or _is_elsewhere(state):
                continue
            profile = msgspec.json.encode(state.cluster)
            if profile not in groups:
                groups[profile] = _Group(this.me.launcher_for(state.cluster))
            groups[profile].runs.append((run_dir, state, control.question(run_dir, state)))
        except FAILURES as error:
            errors[run_dir] = str(error)
    return list(groups.values())


def _is_elsewhere(state: State) -> bool:
    """Whether it is a run of another machine itself: its next attempt is to be launched there."""
    handle = state.attempts[-1].handle if state.attempts else None
    host = (handle or {}).get("host", hostname())
    return bool(state.cluster["launcher"] == "local" and host != hostname())


@contextmanager
def _without_collection() -> Iterator[None]:
    """A thousand states are made and none is dropped: the collector would go through all of them again and again, for
    a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_without_collection()
def follow(this: Keeper, *, clock: Callable[[], float] = now, sleep: Callable[[float], None] = time.sleep) -> Pass:
    """Pass over the runs until nothing is due of any (`control.follow`); the last result of each."""
    results: dict[str, TickResult] = {}
    while True:
        idle = frozenset(run_dir for run_dir, result in results.items() if result.idle)
        last = pass_over(this, clock(), idle)
        results |= last.results
        due = [result.pause for result in last.results.values() if not result.idle]
        if not due:
            return Pass(results, last.errors)
        sleep(min(due))


def left_alone(this: Keeper, done: Pass, clock: float) -> list[str]:
    """The run directories of those that nobody is known to look at when their attempt ends."""
    return [run for run, result in done.results.items() if control.left_alone(this.of(run), result, clock)]


def keep(this: Keeper, left: threading.Event, say: Callable[[str], None], every: float) -> None:
    """Pass over the runs every so many seconds until `left` is set; says what happens to each, a line an event."""
    known: dict[str, str] = {}
    while not left.is_set():
        done = pass_over(this, now())
        lines = {run_dir: _line(result) for run_dir, result in done.results.items()}
        for run_dir, line in (lines | done.errors).items():
            if known.get(run_dir) != line:
                say(f"{run_dir.rsplit('/', 1)[-1]}: {line}")
        known |= lines | done.errors
        busy = any(result.pause == 0 and not isinstance(result.action, Rest) for result in done.results.values())
        left.wait(0 if busy else every)


def _line(result: TickResult) -> str:
    """Where a run stands, in words that change only when something has happened."""
    state = result.state
    if state.status != "running":
        return state.status + (f": {state.failed.message}" if state.failed else "")
    last = state.attempts[-1] if state.attempts else None
    if last is None:
        return "about to begin"
    if last.end:
        return f"attempt {last.number} of {last.phase} ended: {last.end.cause.value}: {last.end.message}"
    # Who reads this in the cluster, by `kubectl logs`, has to learn that the cluster cannot be asked.
    unheard = result.launch.state is LaunchState.UNKNOWN and result.launch.detail
    silence = f"; nothing is heard of it: {result.launch.detail}" if unheard else ""
    return f"attempt {last.number} of {last.phase} is {last.status}{silence}"
