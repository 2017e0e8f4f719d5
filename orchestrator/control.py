"""The controller: what a user asks of a run (submit, resume, stop, cancel) and the tick that keeps it going.

Nothing is remembered between ticks but since when an attempt was missing, and what a cluster did not take away: any
process may tick, and of two that do the log lets one go on. A tick reads the log, looks at the live attempt, decides
(`orchestrator.decide`) and performs that one action (`orchestrator.perform`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from model import storage
from model.contract import (
    Outcome,
    Watcher,
    boot_id,
    claim_file,
    closed_file,
    decode,
    hostname,
    new_nonce,
    now,
    outcome_file,
)
from orchestrator import amend, attempts, code, handoff, store, submission
from orchestrator.decide import (
    NOT_SEEN,
    POLL_SECONDS,
    Action,
    Close,
    Fail,
    Launch,
    Rest,
    Seen,
    Wait,
    decide,
    missing_since,
)
from orchestrator.events import Cancelled, Resumed, StopRequested
from orchestrator.launchers.base import Launcher, LaunchError, Observation, Query
from orchestrator.perform import ControlError, close, insist, load, perform, query
from orchestrator.state import Desired, IllegalEvent, Situation, State, fold
from orchestrator.submission import Request, SpecChangedError

__all__ = [
    "ControlError",
    "Controller",
    "Request",
    "SpecChangedError",
    "Submitted",
    "TickResult",
    "cancel",
    "clear",
    "controller",
    "follow",
    "load",
    "request_stop",
    "resume",
    "submit",
    "tick",
]

LauncherFor = Callable[[Mapping[str, Any]], Launcher]
"""The launcher of a resolved cluster profile."""

SETTLE_SECONDS = {"local": 2.0, "slurm": 40.0, "kubernetes": 30.0}
"""Between two looks for a lost attempt, by launcher: how long a launched job may stay out of sight."""

SETTLE_ELSEWHERE = 30.0


# --- what a user asks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submitted:
    """`what`: created, attached (it is under way or done), resumed or amended."""

    what: str
    state: State
    changes: tuple[amend.Change, ...] = ()


def submit(run_dir: str, request: Request, *, by: str, fork: str | None = None, amending: bool = False) -> Submitted:
    """Create the run, or attach to the one that is there, resuming it if it was stopped or failed.

    Nothing is launched before the first tick.
    fork: `RUN#<phase>@<step>`, where a new run starts from. amending: take up the differences to the run's spec.
    Raises SpecChangedError, ControlError, HandoffError for a reference that cannot be met, LogError.
    """
    run_dir = absolute(run_dir)
    request = submission.plain(request)
    state = fold(store.read(run_dir))
    if state is None:
        try:
            return Submitted("created", submission.create(run_dir, request, fork))
        except store.Conflict:  # somebody submitted it at this very moment
            state = load(run_dir)
    if fork is not None and not submission.is_fork_of(state, attempts.find(handoff.parse(fork), run_dir)):
        raise ControlError(f"run {request.run} is there already and was not forked from {fork}; choose another --run")
    changes = submission.differences(state, request)
    if changes:
        try:
            state = submission.take_up(run_dir, state, request, changes, amending)
        except store.Conflict:  # the run went on meanwhile, and what may change has to be looked at again
            return submit(run_dir, request, by=by, fork=fork, amending=amending)
    state = _with_its_end(run_dir, state)
    if state.situation is not Situation.DONE and _stands(state):
        return Submitted("resumed", resume(run_dir, by=by), tuple(changes))
    return Submitted("amended" if changes else "attached", state, tuple(changes))


def resume(run_dir: str, *, by: str, new_code: bool = False, skip_data: int | None = None) -> State:
    """Go on with a run that was stopped, cancelled or failed; one that is under way is left alone.

    new_code: from now on with the installed model/ or the profile's image, no longer claimed to be bit-exact.
    skip_data: jump over the data of so many steps from the last checkpoint on. Raises ControlError.
    """
    run_dir = absolute(run_dir)
    state = _with_its_end(run_dir, load(run_dir))
    if state.situation is Situation.DONE:
        raise ControlError(f"run {state.created.run} is done; there is nothing to resume")
    if not _stands(state) and not new_code and skip_data is None:
        return state
    digest = code.settle(run_dir, state.cluster) if new_code else None
    try:
        event = Resumed(at=now(), nonce=new_nonce(), by=by, code_digest=digest, skip_data=skip_data)
        return insist(run_dir, event)
    except IllegalEvent as error:
        raise ControlError(f"run {state.created.run}: {error}") from error


def _with_its_end(run_dir: str, state: State) -> State:
    """The state once the end of the live attempt is in the log, if it has said it and nobody has taken it in, as after
    a full disk: what a user asks for now comes after that end, and answers it."""
    outcome = _outcome(run_dir, state.live.number) if state.live else None
    if outcome is None:
        return state
    clock = now()
    end = decide(state, Seen(outcome=outcome), clock)
    assert isinstance(end, Close)
    try:
        return close(run_dir, state, end, clock)
    except store.Conflict:  # somebody else takes it in
        return load(run_dir)


def _stands(state: State) -> bool:
    """Whether it goes on only if a user says so; also if nobody has yet drawn that conclusion from its last end."""
    asked = state.desired is not Desired.RUNNING or state.failed is not None
    return asked or isinstance(decide(state, Seen(), now()), Fail)


def request_stop(run_dir: str, *, by: str, hard: bool = False) -> State:
    """Ask for a stop: seal and end (`hard`: end at once), and launch nothing more until resumed. The next tick does it.

    A run that is stopping or over already is left as it is.
    """
    run_dir = absolute(run_dir)
    try:
        return insist(run_dir, StopRequested(at=now(), nonce=new_nonce(), by=by, hard=hard))
    except IllegalEvent:
        return load(run_dir)


def cancel(run_dir: str, *, by: str) -> State:
    """Give the run up: its attempt seals and stops at the next tick. Raises ControlError if the run is done."""
    run_dir = absolute(run_dir)
    try:
        return insist(run_dir, Cancelled(at=now(), nonce=new_nonce(), by=by))
    except IllegalEvent as error:
        state = load(run_dir)
        if state.situation is Situation.DONE:
            raise ControlError(f"run {state.created.run} is done; there is nothing to cancel") from error
        return state


def absolute(run_dir: str) -> str:
    return run_dir.rstrip("/") if storage.is_uri(run_dir) else os.path.abspath(run_dir)


# --- the tick ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Controller:
    """One process that ticks a run. `missing`: when it first found an attempt gone, by number. `uncleared`: why closed
    attempts may still be on the cluster, in its words; empty if they are not."""

    run_dir: str
    launcher_for: LauncherFor
    me: Watcher
    owner: str
    settle_seconds: float | None = None  # None: what the launcher is known to need
    missing: dict[int, float] = field(default_factory=dict)
    uncleared: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TickResult:
    """`state`: after what was done. `pause`: seconds until another tick is worth it. `launch`: what the launcher said
    before it, if it was asked. `conflict`: others acted first."""

    state: State
    action: Action
    pause: float
    launch: Observation = NOT_SEEN
    conflict: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing is due before the attempt ends, or ever."""
        return isinstance(self.action, Rest) or (isinstance(self.action, Wait) and self.action.settled)

    @property
    def settled(self) -> bool:
        """Whether a controller may leave and none needs to be there: nothing is due but what the attempt's own last act
        will bring, if it has one."""
        return isinstance(self.action, Rest) or (self.idle and self.state.ticks_itself)


def controller(
    run_dir: str,
    launcher_for: LauncherFor,
    *,
    command: str,
    every: float = POLL_SECONDS,
    settle_seconds: float | None = None,
) -> Controller:
    """This process as a controller. command: what `status` shows; every: seconds between its ticks, 0 if it will not
    stay (`follow`)."""
    import psutil  # here, as commands that only read a run do without it

    pid = os.getpid()
    started = psutil.Process(pid).create_time()
    me = Watcher(
        host=hostname(), boot_id=boot_id(), pid=pid, started=started, command=command, seen_at=0.0, every=every
    )  # fmt: skip
    owner = "/".join((me.host, me.boot_id, str(pid), f"{started:.2f}", new_nonce()))
    return Controller(absolute(run_dir), launcher_for, me, owner, settle_seconds)


def tick(this: Controller, clock: float) -> TickResult:
    """Look once and do the one thing that is due. clock: the wall clock now."""
    store.heartbeat(this.run_dir, msgspec.structs.replace(this.me, seen_at=clock))
    state = load(this.run_dir)
    launcher = this.launcher_for(state.cluster)
    asked = question(this.run_dir, state)
    launch = launcher.observe([asked])[0] if asked else NOT_SEEN
    return act(this, state, launcher, launch, clock)


def question(run_dir: str, state: State) -> Query | None:
    """What the launcher has to be asked before it can be decided: nothing without an attempt, or once that has said
    itself how it ended."""
    attempt = state.live
    if attempt is None or storage.exists(f"{run_dir}/{outcome_file(attempt.number)}"):
        return None
    return query(run_dir, state, attempt)


def act(this: Controller, state: State, launcher: Launcher, launch: Observation, clock: float) -> TickResult:
    """The one thing that is due, from the launcher's answer to `question`."""
    action = decide(state, _look(this, state, launch, clock), clock)
    try:
        after = perform(this.run_dir, this.owner, state, launcher, action, clock)
    except store.Conflict:
        return TickResult(state, action, 0.0, launch, conflict=True)
    if isinstance(action, (Launch, Close)) or this.uncleared:
        clear(this, after, launcher)
    pause = action.seconds if isinstance(action, Wait) else POLL_SECONDS if after is state else 0.0
    return TickResult(after, action, pause, launch)


def clear(this: Controller, state: State, launcher: Launcher) -> None:
    """Take off the cluster what is there of closed attempts: what came back, or a cluster did not take away before. One
    that does not answer is asked again with the next tick; what stays meanwhile finds its attempt closed, and ends."""
    this.uncleared.clear()
    closed = [query(this.run_dir, state, attempt) for attempt in state.attempts if attempt.end is not None]
    try:
        if closed:
            launcher.clear(closed)
    except LaunchError as error:
        this.uncleared.append(str(error))


@dataclass(frozen=True)
class Followed:
    """`left_alone`: nobody is known to look when the attempt ends, neither its own last act nor who watches."""

    state: State
    left_alone: bool


def follow(
    this: Controller, *, clock: Callable[[], float] = now, sleep: Callable[[float], None] = time.sleep
) -> Followed:
    """Tick until nothing is due: the run is over, its attempt is under way, or somebody else watches.

    An agent's last act, and `dinoctl tick RUN`; of two that follow neither counts on the other (`every` 0).
    """
    began = clock()
    while True:
        result = tick(this, clock())
        watched = any(store.surely_watches(other, began, clock()) for other in _others(this, result.state))
        if isinstance(result.action, Rest):  # who saw the run's end may have found the cluster silent
            clear(this, result.state, this.launcher_for(result.state.cluster))
        if result.idle or (isinstance(result.action, Wait) and watched):
            return Followed(result.state, left_alone(this, result, clock()))
        sleep(result.pause)


def left_alone(this: Controller, result: TickResult, clock: float) -> bool:
    """Whether nobody is known to look once the attempt has ended, if this process leaves."""
    return not result.settled and not any(store.is_alive(other, clock) for other in _others(this, result.state))


def _others(this: Controller, state: State) -> list[Watcher]:
    known = store.watchers(this.run_dir, of_folder=state.cluster["launcher"] != "local")
    return [watcher for watcher in known if (watcher.host, watcher.pid) != (this.me.host, this.me.pid)]


def _look(this: Controller, state: State, launch: Observation, clock: float) -> Seen:
    attempt = state.live
    if attempt is None:
        return Seen()
    if (outcome := _outcome(this.run_dir, attempt.number)) is not None:
        return Seen(outcome=outcome)  # the agent's own word: the launcher has nothing to add
    seen = Seen(
        launch=launch,
        closed=storage.exists(f"{this.run_dir}/{closed_file(attempt.number)}"),
        claimed=storage.exists(f"{this.run_dir}/{claim_file(attempt.number)}"),
        owner_gone=attempt.handle is None and _owner_gone(attempt.intent.owner),
        settle_seconds=_settle_seconds(this, state),
    )
    since = missing_since(this.missing.get(attempt.number), attempt, seen, clock)
    this.missing.clear()
    if since is None:
        return seen
    this.missing[attempt.number] = since
    outcome = _outcome(this.run_dir, attempt.number)  # it may have ended while the launcher was asked
    return Seen(outcome=outcome) if outcome else replace(seen, missing_for=clock - since)


def _outcome(run_dir: str, attempt: int) -> Outcome | None:
    path = f"{run_dir}/{outcome_file(attempt)}"
    return decode(storage.read(path), Outcome, path) if storage.exists(path) else None


def _settle_seconds(this: Controller, state: State) -> float:
    if this.settle_seconds is not None:
        return this.settle_seconds
    return SETTLE_SECONDS.get(state.cluster["launcher"], SETTLE_ELSEWHERE)


def _owner_gone(owner: str) -> bool:
    """Whether the process that meant to launch is known to have ended; of another machine's nothing is known."""
    host, boot, pid, started, _ = owner.split("/")
    return store.process_is_there(host, boot, int(pid), float(started)) is False
