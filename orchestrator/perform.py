"""Carrying out a decision: the log, the files of an attempt and the launcher, in the order that survives a crash.

The event that says what is about to happen comes first wherever doing it twice would harm; whoever finds it there
without its effect looks before acting.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import Any

from model import storage
from model.contract import EVALUATE, Attempt, Cause, Record, attempt_yaml, closed_file, encode, new_nonce
from orchestrator import attempts, retention, store
from orchestrator.code import CodeError
from orchestrator.decide import Action, Adopt, AskToStop, Close, Fail, Launch, Rest, Wait, end_of
from orchestrator.events import AttemptIntended, AttemptLaunched, AttemptStopping, Event, RunFailed
from orchestrator.failures import verdict
from orchestrator.handoff import BadCheckpointError, HandoffError
from orchestrator.launchers.base import Launcher, LaunchError, Query, UnansweredError
from orchestrator.problems import listed
from orchestrator.state import AttemptState, IllegalEvent, State, apply, fold

LEASE_SECONDS = 60.0
"""How long whoever intends an attempt may take to submit it."""

TRIES = 50
"""Appends that may lose against other controllers before something must be wrong."""


class ControlError(RuntimeError):
    """What was asked of a run cannot be done; the message says why and what to do instead."""


def load(run_dir: str) -> State:
    """The state of the run in that directory. Raises ControlError if there is none, LogError, ContractError."""
    state = fold(store.read(run_dir))
    if state is None:
        raise ControlError(f"no run at {run_dir}; `dinoctl status` lists the runs that are there")
    return state


def append(run_dir: str, state: State, event: Event) -> State:
    """Append to a log that stands at `state`; the state after it. Raises IllegalEvent, Conflict."""
    after = apply(state, event)
    store.append(run_dir, after.events, event)
    return after


def insist(run_dir: str, event: Event) -> State:
    """Append wherever the log stands by now, as long as the event is legal there. Raises IllegalEvent."""
    for _ in range(TRIES):
        try:
            return append(run_dir, load(run_dir), event)
        except store.Conflict:
            continue
    raise ControlError(f"{run_dir}: {TRIES} other events came first, one after the other; try again")


def query(run_dir: str, state: State, attempt: AttemptState) -> Query:
    """What a launcher needs to look an attempt up or to cancel it."""
    intent = attempt.intent
    return Query(
        run_dir, state.created.run_id, attempt.number, intent.launch_name, intent.digest, attempt.handle or None
    )


# --- the actions ---------------------------------------------------------------


def perform(run_dir: str, owner: str, state: State, launcher: Launcher, action: Action, clock: float) -> State:
    """Do it, and give the state afterwards. Raises Conflict if another controller acted first."""
    match action:
        case Launch():
            return _launch(run_dir, owner, state, launcher, action, clock)
        case Adopt(number, handle):
            event = AttemptLaunched(at=clock, nonce=new_nonce(), attempt=number, handle=handle)
            return append(run_dir, state, event)
        case AskToStop():
            return _ask_to_stop(run_dir, state, launcher, action, clock)
        case Close():
            return _close(run_dir, state, launcher, action, clock)
        case Fail(cause, message):
            return append(run_dir, state, RunFailed(at=clock, nonce=new_nonce(), cause=cause, message=message))
        case Wait() | Rest():
            return state


def _launch(run_dir: str, owner: str, state: State, launcher: Launcher, action: Launch, clock: float) -> State:
    begun = time.monotonic()
    try:
        resources = state.settings(action.phase)["resources"]
        usable = partial(launcher.usable_nodes, resources, list(state.excluded(state.at)))
        nodes = attempts.nodes_for(state, action.phase, usable)
        attempt = attempts.build(state, run_dir, action.number, action.phase, nodes=nodes)
    except BadCheckpointError as error:
        message = verdict(Cause.BAD_CHECKPOINT, 1, str(error))
        return perform(run_dir, owner, state, launcher, Fail(Cause.BAD_CHECKPOINT, message), clock)
    except (HandoffError, CodeError) as error:
        return perform(run_dir, owner, state, launcher, Fail(Cause.USER_ERROR, str(error)), clock)
    data, digest = attempts.to_yaml(attempt)
    try:
        storage.publish(f"{run_dir}/{attempt_yaml(action.number)}", data)
    except storage.AlreadyPublished:
        # Somebody wrote it, died before the intent, and the spec has been amended since, or nodes have come or gone:
        # that number is spent.
        return _launch(run_dir, owner, state, launcher, Launch(action.number + 1, action.phase), clock)
    intent = AttemptIntended(
        at=clock, nonce=new_nonce(), attempt=attempt.attempt, phase=attempt.phase, launch_name=attempt.launch_name,
        digest=digest, owner=owner, lease_until=clock + LEASE_SECONDS, nodes=attempt.nodes,
    )  # fmt: skip
    intended = append(run_dir, state, intent)
    if time.monotonic() - begun > LEASE_SECONDS:
        return intended  # too late to submit: it is looked up and given up like anybody else's
    return _submit(run_dir, intended, launcher, attempt, digest, clock)


def _submit(run_dir: str, intended: State, launcher: Launcher, attempt: Attempt, digest: str, clock: float) -> State:
    try:
        handle = launcher.submit(attempt, digest)
    except UnansweredError:
        return intended  # it may have been taken: it is looked up by its name, as after a crash
    except LaunchError as error:
        without = f" (without {listed(attempt.exclude)}, which failed this run)" if attempt.exclude else ""
        refusal = Close(attempt.attempt, Cause.NOT_LAUNCHED, f"the launcher refused it{without}: {error}")
        return _close(run_dir, intended, launcher, refusal, clock)
    return _launched(run_dir, launcher, attempt.attempt, handle, clock)


def _launched(run_dir: str, launcher: Launcher, number: int, handle: dict[str, Any], clock: float) -> State:
    try:
        return insist(run_dir, AttemptLaunched(at=clock, nonce=new_nonce(), attempt=number, handle=handle))
    except IllegalEvent:
        # Another controller saw the job before we could say so and adopted it, or has already closed the attempt.
        state = load(run_dir)
        mine = next(attempt for attempt in state.attempts if attempt.number == number)
        if mine.end is not None:
            launcher.cancel(query(run_dir, state, mine), hard=True)
        return state


def _ask_to_stop(run_dir: str, state: State, launcher: Launcher, action: AskToStop, clock: float) -> State:
    if not action.again:
        event = AttemptStopping(at=clock, nonce=new_nonce(), attempt=action.number, hard=action.hard)
        state = append(run_dir, state, event)
    assert state.live is not None
    launcher.cancel(query(run_dir, state, state.live), hard=action.hard)
    return state


def _close(run_dir: str, state: State, launcher: Launcher, action: Close, clock: float) -> State:
    assert state.live is not None
    if action.gone:
        launcher.cancel(query(run_dir, state, state.live), hard=True)
    return close(run_dir, state, action, clock)


class Closed(Record, frozen=True):
    """The controller ended this attempt: nothing that it seals or removes from now on counts."""

    nonce: str


def close(run_dir: str, state: State, action: Close, clock: float) -> State:
    """End the attempt, which said so itself or of which nothing is left, with the checkpoints that are sealed once it
    is closed; then remove what is not kept. Raises Conflict.

    First closed, then looked: a worker that is still there removes a checkpoint only with newer ones sealed and its
    attempt not closed (`model.retention`), so that those are found here. What it seals between the two is as whole as
    any, and whoever is first with the event decides whether it counts.
    """
    attempt = state.live
    assert attempt is not None
    with suppress(storage.AlreadyPublished):
        storage.publish(f"{run_dir}/{closed_file(attempt.number)}", encode(Closed(nonce=new_nonce())))
    sealed = [] if attempt.phase == EVALUATE else attempts.sealed_steps(run_dir, attempt.phase, attempt.number)
    after = append(run_dir, state, end_of(state, action, sealed, clock, new_nonce()))
    retention.prune_ended(run_dir, after, attempt.phase)
    return after
