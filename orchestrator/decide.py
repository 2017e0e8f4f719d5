"""What is to be done next, from the state of a run and from what was seen of its live attempt. Pure.

`decide` gives one action; `orchestrator.control` performs it, and the next tick decides afresh. Nothing is decided from
a launcher that did not answer, and an attempt is only ever given up after two looks a settling time apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.contract import Cause, Outcome
from orchestrator.events import AttemptEnded
from orchestrator.failures import backoff, verdict
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.state import AttemptState, Desired, Situation, State

POLL_SECONDS = 1.0
"""How soon to look again when nothing is due at a known time."""

GRACE_SECONDS = 60.0
"""Beyond health.notice_seconds: how long a stop that was asked for may take before the attempt is ended at once."""

NOT_SEEN = Observation(LaunchState.UNKNOWN)


@dataclass(frozen=True)
class Seen:
    """What a tick saw of the live attempt. `missing_for`: seconds since this controller first found it gone, see
    `missing_since`; `owner_gone`: the process that meant to launch it has ended."""

    launch: Observation = NOT_SEEN
    outcome: Outcome | None = None
    closed: bool = False
    claimed: bool = False
    owner_gone: bool = False
    missing_for: float | None = None
    settle_seconds: float = 30.0


# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Intend attempt `number` of `phase`, submit it, and say so."""

    number: int
    phase: str


@dataclass(frozen=True)
class Adopt:
    """The launcher has the attempt although the log only says that it was intended."""

    number: int
    handle: dict[str, Any]


@dataclass(frozen=True)
class AskToStop:
    """`again`: it was asked at once already, and is still there."""

    number: int
    hard: bool
    again: bool = False


@dataclass(frozen=True)
class Close:
    """End the attempt in the log. `gone`: it left no outcome, so whatever may be left of it is cancelled first.
    `bad_nodes`: not to be placed on for a while."""

    number: int
    cause: Cause
    message: str
    reached: int | None = None
    gone: bool = False
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fail:
    cause: Cause
    message: str


@dataclass(frozen=True)
class Wait:
    """`settled`: nothing is due before the attempt ends, and its own last act is a tick if it has one
    (`State.ticks_itself`): a controller that only looks once may leave."""

    seconds: float
    why: str
    settled: bool = False


@dataclass(frozen=True)
class Rest:
    """Nothing is left to do: done, failed, stopped or cancelled."""

    situation: Situation


Action = Launch | Adopt | AskToStop | Close | Fail | Wait | Rest


def decide(state: State, seen: Seen, now: float) -> Action:
    """The one thing to do. `seen` is of `state.live`, and not looked at if there is none; `now` is the wall clock."""
    attempt = state.live
    if attempt is None:
        return _without_attempt(state, now)
    if seen.outcome is not None:
        said = seen.outcome
        return Close(attempt.number, said.cause, said.message, said.step, bad_nodes=tuple(said.bad_nodes))
    if seen.closed:  # whoever closed it died before the event
        return _gone(attempt, seen)
    if seen.launch.state is LaunchState.UNKNOWN:
        return Wait(POLL_SECONDS, f"the launcher does not answer: {seen.launch.detail}", attempt.handle is not None)
    if attempt.handle is None:
        return _intended(attempt, seen, now)
    if seen.launch.state in (LaunchState.PENDING, LaunchState.RUNNING):
        return _under_way(state, attempt, seen, now)
    return _missing(attempt, seen)


def _without_attempt(state: State, now: float) -> Action:
    due = state.next_stage
    if state.situation is not Situation.IDLE or due is None:
        return Rest(state.situation)
    failure = state.failure
    if failure is not None:
        count = state.counts[failure.cause]
        pause = backoff(failure.cause, count)
        if pause is None:
            return Fail(failure.cause, verdict(failure.cause, count, failure.message))
        if failure.cause is Cause.UNPLACED:
            pause *= _jitter(state)
        # An end that lies ahead of this clock was written by another machine's: waiting for it would prove nothing.
        left = pause - (now - failure.at)
        if 0 < left <= pause:
            return Wait(left, f"{failure.cause.value}: the next try is due in {left:.0f} s")
    number = state.attempts[-1].number + 1 if state.attempts else 1
    return Launch(number, due.name)


def _jitter(state: State) -> float:
    """Between 0.5 and 1.5, another for each run and each of its attempts: of two runs that each held what the other
    lacked, one comes back first and finds all of it free."""
    drawn = hashlib.sha256(f"{state.created.run_id}:{state.attempts[-1].number}".encode()).digest()
    return 0.5 + int.from_bytes(drawn[:4], "big") / 2**32


def _intended(attempt: AttemptState, seen: Seen, now: float) -> Action:
    if seen.launch.state is not LaunchState.ABSENT:
        return Adopt(attempt.number, seen.launch.handle or {})
    left = 0.0 if seen.owner_gone else attempt.intent.lease_until - now
    if left > 0:
        return Wait(min(left, POLL_SECONDS), f"{attempt.intent.owner} is launching attempt {attempt.number}")
    return _missing(attempt, seen)


def _missing(attempt: AttemptState, seen: Seen) -> Action:
    left = seen.settle_seconds - (seen.missing_for or 0.0)
    if seen.missing_for is None or left > 0:
        return Wait(max(min(left, POLL_SECONDS), 0.05), f"attempt {attempt.number} is gone; looking once more")
    return _gone(attempt, seen)


def _gone(attempt: AttemptState, seen: Seen) -> Close:
    cause, message = _why_gone(attempt, seen)
    return Close(attempt.number, cause, message, gone=True, bad_nodes=seen.launch.bad_nodes)


def _why_gone(attempt: AttemptState, seen: Seen) -> tuple[Cause, str]:
    """Of an attempt without an outcome: what was asked of it, else the scheduler's word for its end."""
    detail = f": {seen.launch.detail}" if seen.launch.detail else ""
    if attempt.handle is None and not seen.claimed:
        return Cause.NOT_LAUNCHED, f"attempt {attempt.number} was never launched{detail}"
    if attempt.stopping is not None and attempt.stopping.hard:
        return Cause.UNSEALED, f"attempt {attempt.number} was ended at once, as asked"
    if attempt.stopping is not None and not seen.claimed:
        return Cause.STOPPED, f"attempt {attempt.number} was stopped before it began, as asked"
    told = seen.launch.cause
    # That all went well is for the agent alone to say: an end without its word may have lost the last record.
    cause = Cause.VANISHED if told is None or told is Cause.DONE else told
    return cause, f"attempt {attempt.number} is gone and left no outcome{detail}"


def _under_way(state: State, attempt: AttemptState, seen: Seen, now: float) -> Action:
    asked = attempt.stopping
    if state.desired is Desired.RUNNING:
        return Wait(POLL_SECONDS, f"attempt {attempt.number} is {seen.launch.state.value}", settled=True)
    if asked is None:
        return AskToStop(attempt.number, hard=state.hard)
    if asked.hard:
        return AskToStop(attempt.number, hard=True, again=True)
    patience = float(state.settings(attempt.phase)["health"]["notice_seconds"]) + GRACE_SECONDS
    if state.hard or now - asked.at > patience:
        return AskToStop(attempt.number, hard=True)
    return Wait(POLL_SECONDS, f"attempt {attempt.number} was asked to seal and stop", settled=True)


# --- what belongs to a decision ---------------------------------------------------------------------------------------


def missing_since(before: float | None, attempt: AttemptState, seen: Seen, now: float) -> float | None:
    """When this controller first found the attempt gone, in a row of looks that all did; None if it is not gone.

    While somebody may still submit an intended attempt, its absence shows nothing. A look without an answer neither
    adds to the row nor breaks it.
    """
    if seen.launch.state is LaunchState.UNKNOWN:
        return before
    if seen.launch.state in (LaunchState.PENDING, LaunchState.RUNNING):
        return None
    if attempt.handle is None and not seen.owner_gone and now < attempt.intent.lease_until:
        return None
    return now if before is None else before


def end_of(state: State, close: Close, steps: Sequence[int], at: float, nonce: str) -> AttemptEnded:
    """The event that ends the attempt with these sealed steps. Done without its last checkpoint is a crash."""
    attempt = state.live
    assert attempt is not None
    last = next(stage.last for stage in state.stages if stage.name == attempt.phase)
    cause, message = close.cause, close.message
    if cause is Cause.DONE and last is not None and last not in steps:
        cause, message = Cause.CRASHED, f"it said that it was done, but checkpoint {last} is not sealed"
    return AttemptEnded(
        at=at, nonce=nonce, attempt=attempt.number, cause=cause, message=message, steps=sorted(steps),
        reached=close.reached, bad_nodes=sorted(set(close.bad_nodes)),
    )  # fmt: skip
