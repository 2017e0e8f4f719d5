"""The controller: what a user asks of a run (submit, resume, stop, cancel) and the tick that keeps it going.

Nothing is remembered between ticks but since when an attempt was missing: any process may tick, and of two that do the
log lets one go on. A tick reads the log, looks at the live attempt, decides (`orchestrator.decide`) and performs that
one action (`orchestrator.perform`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import msgspec

from model import storage
from model.contract import (
    EVALUATE,
    FORMAT,
    CheckpointRef,
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
from orchestrator import amend, attempts, code, handoff, store
from orchestrator.decide import POLL_SECONDS, Action, Rest, Seen, Wait, decide, missing_since
from orchestrator.events import Cancelled, Resumed, RunCreated, SpecAmended, StopRequested
from orchestrator.handoff import HandoffError
from orchestrator.launchers.base import Launcher
from orchestrator.perform import ControlError, append, insist, load, perform, query
from orchestrator.state import Desired, IllegalEvent, Situation, State, apply, fold

__all__ = [
    "ControlError",
    "Controller",
    "Request",
    "SpecChangedError",
    "Submitted",
    "TickResult",
    "cancel",
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

SETTLE_SECONDS = {"local": 2.0}
"""Between two looks for a lost attempt, by launcher: how long a launched job may stay out of sight."""

SETTLE_ELSEWHERE = 30.0


# --- what a user asks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A job to submit: resolved spec and cluster profile as plain mappings, under the name of the run."""

    run: str
    spec: dict[str, Any]
    cluster: dict[str, Any]
    spec_digest: str


@dataclass(frozen=True)
class Submitted:
    """`what`: created, attached (it is under way or done), resumed or amended."""

    what: str
    state: State
    changes: tuple[amend.Change, ...] = ()


class SpecChangedError(ControlError):
    """The run has another spec; `changes` are the differences, `refused` those that no amendment takes up."""

    def __init__(self, run: str, changes: list[amend.Change], refused: list[amend.Change]) -> None:
        self.changes, self.refused = changes, refused
        if refused:
            advice = (
                "these are fixed once their phase has begun; begin a new run: submit --run NEW [--fork RUN#PHASE@STEP]"
            )
        else:
            advice = "submit with --amend to take them up, or begin a new run with --run NEW"
        lines = "\n".join(f"  {change}" for change in refused or changes)
        super().__init__(f"run {run} is there already with another spec:\n{lines}\n{advice}")


def submit(run_dir: str, request: Request, *, by: str, fork: str | None = None, amending: bool = False) -> Submitted:
    """Create the run, or attach to the one that is there, resuming it if it was stopped or failed.

    Nothing is launched before the first tick.
    fork: `RUN#<phase>@<step>`, where a new run starts from. amending: take up the differences to the run's spec.
    Raises SpecChangedError, ControlError, HandoffError for a reference that cannot be met, LogError.
    """
    run_dir = absolute(run_dir)
    request = replace(request, spec=_plain(request.spec), cluster=_plain(request.cluster))
    state = fold(store.read(run_dir))
    if state is None:
        try:
            return Submitted("created", _create(run_dir, request, fork))
        except store.Conflict:  # somebody submitted it at this very moment
            state = load(run_dir)
    if fork is not None and not _is_fork_of(state, attempts.find(handoff.parse(fork), run_dir)):
        raise ControlError(f"run {request.run} is there already and was not forked from {fork}; choose another --run")
    changes = _changes(state, request)
    if changes:
        try:
            state = _amend(run_dir, state, request, changes, amending)
        except store.Conflict:  # the run went on meanwhile, and what may change has to be looked at again
            return submit(run_dir, request, by=by, fork=fork, amending=amending)
    stopped = state.desired is not Desired.RUNNING or state.failed is not None
    if stopped and state.situation is not Situation.DONE:
        return Submitted("resumed", resume(run_dir, by=by), tuple(changes))
    return Submitted("amended" if changes else "attached", state, tuple(changes))


def resume(run_dir: str, *, by: str, new_code: bool = False) -> State:
    """Go on with a run that was stopped, cancelled or failed; one that is under way is left alone.

    new_code: from now on with the installed model/, no longer claimed to be bit-exact. Raises ControlError.
    """
    run_dir = absolute(run_dir)
    state = load(run_dir)
    if state.situation is Situation.DONE:
        raise ControlError(f"run {state.created.run} is done; there is nothing to resume")
    if state.status == "running" and state.desired is Desired.RUNNING and not new_code:
        return state
    digest = code.pin(run_dir) if new_code else None
    try:
        return insist(run_dir, Resumed(at=now(), nonce=new_nonce(), by=by, code_digest=digest))
    except IllegalEvent as error:
        raise ControlError(f"run {state.created.run}: {error}") from error


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


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As the log will give it back, so that equal specs compare equal."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return plain


def _create(run_dir: str, request: Request, fork: str | None) -> State:
    """The first event, once all that can be checked is; only then the code is copied. Raises Conflict."""
    run_id = os.urandom(16).hex()
    event = RunCreated(
        at=now(), nonce=new_nonce(), format=FORMAT, run=request.run, run_id=run_id, spec=request.spec,
        cluster=request.cluster, spec_digest=request.spec_digest, code_digest="", version=version("dinoctl"),
        forked_from=_fork(run_dir, request, fork, run_id) if fork else None,
    )  # fmt: skip
    try:
        _check_references(apply(None, event), run_dir)
    except IllegalEvent as error:
        raise ControlError(f"run {request.run}: {error}") from error
    store.prove(run_dir)
    event = msgspec.structs.replace(event, code_digest=code.pin(run_dir))
    store.append(run_dir, 1, event)
    return apply(None, event)


def _fork(run_dir: str, request: Request, fork: str, run_id: str) -> CheckpointRef:
    """The checkpoint that a fork begins with, pinned. Its networks and kind of phase must be those of the new spec."""
    reference = handoff.parse(fork)
    if reference.run is None:
        raise HandoffError(f"--fork {fork}: name the run too, as RUN#{fork}")
    found = attempts.find(reference, run_dir)
    if found.phase not in request.spec["phases"]:
        raise ControlError(
            f"--fork {fork}: the new spec has no phase {found.phase}; it needs that phase to go on from it"
        )
    other = load(found.run)
    kinds = [spec["phases"][found.phase]["kind"] for spec in (other.spec, request.spec)]
    networks = amend.changes({"model": other.spec["model"]}, {"model": request.spec["model"]})
    if kinds[0] != kinds[1] or networks:
        what = (
            "\n".join(f"  {change}" for change in networks) or f"  phases.{found.phase}.kind: {kinds[0]} -> {kinds[1]}"
        )
        raise ControlError(f"--fork {fork}: a fork goes on with the same networks and kind of phase:\n{what}")
    return attempts.take(run_id, run_dir, reference, [])


def _is_fork_of(state: State, found: CheckpointRef) -> bool:
    fork = state.created.forked_from
    return fork is not None and (fork.run, fork.phase, fork.step) == (found.run, found.phase, found.step)


def _changes(state: State, request: Request) -> list[amend.Change]:
    profile = amend.changes({"cluster": state.cluster}, {"cluster": request.cluster})
    return [*amend.changes(state.spec, request.spec), *profile]


def _amend(run_dir: str, state: State, request: Request, changes: list[amend.Change], amending: bool) -> State:
    refused = amend.refused(state, changes)
    if refused or not amending:
        raise SpecChangedError(request.run, changes, refused)
    event = SpecAmended(
        at=now(), nonce=new_nonce(), spec=request.spec, cluster=request.cluster, spec_digest=request.spec_digest,
        changed=[".".join(change.path) for change in changes],
    )  # fmt: skip
    try:
        _check_references(apply(state, event), run_dir)
        return append(run_dir, state, event)
    except IllegalEvent as error:
        raise ControlError(f"run {request.run} cannot be amended so: {error}") from error


def _check_references(state: State, run_dir: str) -> None:
    """Every input that can be known now is there: checkpoints of other runs, pinned, and of phases that are over."""
    over = {stage.name for stage in state.stages if state.is_over(stage)}
    for stage in state.stages:
        if stage.name in over:
            continue
        for name, written in handoff.references(state.spec, stage.name).items():
            reference = attempts.inherit(state, written)
            if reference.run is not None and stage.name != EVALUATE:
                attempts.take(state.created.run_id, run_dir, reference, [name])
            elif reference.phase in over and reference.run is None:
                handoff.own(state.spec, reference, state.accepted(), run_dir)


# --- the tick ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Controller:
    """One process that ticks a run. `missing`: when it first found an attempt gone, by number."""

    run_dir: str
    launcher_for: LauncherFor
    me: Watcher
    owner: str
    settle_seconds: float | None = None  # None: what the launcher is known to need
    missing: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TickResult:
    """`state`: after what was done. `pause`: seconds until another tick is worth it. `conflict`: others acted first."""

    state: State
    action: Action
    pause: float
    conflict: bool = False

    @property
    def settled(self) -> bool:
        """Whether a controller may leave: nothing is due but what the attempt's own last act will bring."""
        return isinstance(self.action, Rest) or (isinstance(self.action, Wait) and self.action.settled)


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
    action = decide(state, _look(this, state, launcher, clock), clock)
    try:
        after = perform(this.run_dir, this.owner, state, launcher, action, clock)
    except store.Conflict:
        return TickResult(state, action, 0.0, conflict=True)
    pause = action.seconds if isinstance(action, Wait) else POLL_SECONDS if after is state else 0.0
    return TickResult(after, action, pause)


def follow(this: Controller, *, clock: Callable[[], float] = now, sleep: Callable[[float], None] = time.sleep) -> State:
    """Tick until the run can be left: it is over, its attempt is under way, or somebody else watches.

    An agent's last act, and what a detached submit does; of two that follow neither counts on the other (`every` 0).
    """
    while True:
        result = tick(this, clock())
        others = [w for w in store.watchers(this.run_dir) if (w.host, w.pid) != (this.me.host, this.me.pid)]
        watched = isinstance(result.action, Wait) and any(store.is_alive(watcher, clock()) for watcher in others)
        if result.settled or watched:
            return result.state
        sleep(result.pause)


def _look(this: Controller, state: State, launcher: Launcher, clock: float) -> Seen:
    attempt = state.live
    if attempt is None:
        return Seen()
    if (outcome := _outcome(this.run_dir, attempt.number)) is not None:
        return Seen(outcome=outcome)  # the agent's own word: the launcher has nothing to add
    seen = Seen(
        launch=launcher.observe([query(this.run_dir, state, attempt)])[0],
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
