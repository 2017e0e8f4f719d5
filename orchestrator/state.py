"""The state of a run as the fold of its events. Pure: no clock, no files, no launcher.

`apply(state, event)` is the fold; an event that cannot follow raises IllegalEvent and changes nothing, since a State is
frozen. What is to be done next follows from the state in `orchestrator.decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec
from msgspec.structs import replace

from model.contract import EVALUATE, Cause, CheckpointRef
from orchestrator import sections
from orchestrator.events import (
    AttemptEnded,
    AttemptIntended,
    AttemptLaunched,
    AttemptStopping,
    Cancelled,
    Event,
    Resumed,
    RunCreated,
    RunFailed,
    SpecAmended,
    StopRequested,
)

EXCLUDE_HOURS = 24.0
"""How long a node that failed a run is left out by it, where the cluster's profile does not say."""


class IllegalEvent(ValueError):  # noqa: N818 - the event is what is illegal
    """The event cannot follow the log so far; the message says why."""


class Desired(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    CANCELLED = "cancelled"


class Situation(StrEnum):
    """Where a run is, as far as the log tells."""

    IDLE = "idle"  # no attempt is under way, and one is due
    INTENDED = "intended"  # somebody is launching an attempt
    LAUNCHED = "launched"  # the launcher took it
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    DONE = "done"


class Stage(msgspec.Struct, frozen=True):
    """A phase, or the evaluation after the last one. `last` is its last step; the evaluation has none."""

    name: str
    last: int | None


class AttemptState(msgspec.Struct, frozen=True):
    intent: AttemptIntended
    handle: dict[str, Any] | None = None  # once it is launched
    stopping: AttemptStopping | None = None
    end: AttemptEnded | None = None

    @property
    def number(self) -> int:
        return self.intent.attempt

    @property
    def phase(self) -> str:
        return self.intent.phase

    @property
    def status(self) -> str:
        """`intended`, `launched` or `ended`."""
        return "ended" if self.end else "intended" if self.handle is None else "launched"


class State(msgspec.Struct, frozen=True):
    """counts: ends of each cause since the last progress. failure: the end that the next decision has to answer."""

    created: RunCreated
    spec: dict[str, Any]
    cluster: dict[str, Any]
    spec_digest: str
    code_digest: str
    attempts: tuple[AttemptState, ...] = ()
    desired: Desired = Desired.RUNNING
    hard: bool = False
    failed: RunFailed | None = None
    counts: Mapping[Cause, int] = msgspec.field(default_factory=dict)
    failure: AttemptEnded | None = None
    jumps: tuple[tuple[str, int, int], ...] = ()  # phase, updates before, and steps of data that are jumped over
    events: int = 1
    at: float = 0.0  # of the newest event, by its publisher's clock

    @property
    def stages(self) -> tuple[Stage, ...]:
        phases = [Stage(name, int(settings["steps"])) for name, settings in self.spec["phases"].items()]
        return (*phases, Stage(EVALUATE, None)) if self.spec.get("evaluate") else tuple(phases)

    @property
    def ticks_itself(self) -> bool:
        """Whether an attempt's own last act is a tick. A pod is gone with its agent, and has none."""
        return bool(self.cluster["launcher"] != "kubernetes")

    @property
    def live(self) -> AttemptState | None:
        """The attempt that is under way; there is never more than one."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].end is None else None

    @property
    def situation(self) -> Situation:
        if self.live:
            return Situation.INTENDED if self.live.handle is None else Situation.LAUNCHED
        if self.next_stage is None:
            return Situation.DONE
        if self.desired is Desired.CANCELLED:
            return Situation.CANCELLED
        if self.failed:
            return Situation.FAILED
        return Situation.STOPPED if self.desired is Desired.STOPPED else Situation.IDLE

    @property
    def status(self) -> str:
        """For people and exit codes: running, stopped, cancelled, failed or done."""
        under_way = self.situation in (Situation.IDLE, Situation.INTENDED, Situation.LAUNCHED)
        return "running" if under_way else self.situation.value

    @property
    def next_stage(self) -> Stage | None:
        """The first stage that is not over."""
        return next((stage for stage in self.stages if not self.is_over(stage)), None)

    def is_inherited(self, phase: str, step: int | None = None) -> bool:
        """Whether the state of `phase` after `step` updates (after its last, if None) is the forked run's."""
        fork = self.created.forked_from
        if fork is None or phase == EVALUATE:
            return False
        names = [stage.name for stage in self.stages]
        if phase not in names:
            return False
        if phase == fork.phase:
            return (self.stages[names.index(phase)].last if step is None else step) in range(1, fork.step + 1)
        return names.index(phase) < names.index(fork.phase)

    def is_over(self, stage: Stage) -> bool:
        """A phase is over once its last step is sealed and counts, the evaluation once it was done."""
        if self.is_inherited(stage.name):
            return True
        ends = [attempt.end for attempt in self.attempts if attempt.end and attempt.phase == stage.name]
        if stage.last is None:
            return any(end.cause is Cause.DONE for end in ends)
        return any(stage.last in end.steps for end in ends)

    def has_begun(self, stage: str) -> bool:
        fork = self.created.forked_from
        forked = fork is not None and (stage == fork.phase or self.is_inherited(stage))
        return forked or any(attempt.phase == stage for attempt in self.attempts)

    def accepted(self) -> dict[str, list[tuple[int, int]]]:
        """Phase -> (attempt, step) of each sealed checkpoint that counts, in the order of the attempts."""
        found: dict[str, list[tuple[int, int]]] = {}
        for attempt in self.attempts:
            for step in attempt.end.steps if attempt.end else ():
                found.setdefault(attempt.phase, []).append((attempt.number, step))
        return found

    def resume_points(self, phase: str, run_dir: str) -> list[CheckpointRef]:
        """What an attempt of `phase` may go on from: accepted checkpoints, newest first; none means step 0."""
        own = [CheckpointRef(run=run_dir, phase=phase, attempt=a, step=s) for a, s in self.accepted().get(phase, [])]
        fork = self.created.forked_from
        known = [fork, *own] if fork is not None and fork.phase == phase else own
        return sorted(known, key=lambda ref: (ref.step, ref in own, ref.attempt), reverse=True)

    @property
    def has_lost_nodes(self) -> bool:
        return any(attempt.end and attempt.end.bad_nodes for attempt in self.attempts)

    def excluded(self, at: float) -> dict[str, float]:
        """Nodes that failed this run and are left out at that time -> until when, in the order of their names.

        What an attempt is told is asked for `state.at`: a clock of its own would give one attempt two digests.
        """
        until: dict[str, float] = {}
        seconds = 3600 * self.exclude_hours
        for end in (attempt.end for attempt in self.attempts if attempt.end):
            until |= dict.fromkeys(end.bad_nodes, end.at + seconds)
        return {node: until[node] for node in sorted(until) if at < until[node]}

    @property
    def exclude_hours(self) -> float:
        """As the stage that is due has it, which may be otherwise than its cluster's."""
        stage = self.next_stage or self.stages[-1]
        resources = self.settings(stage.name).get("resources", {})
        name: sections.Scheduler = "kubernetes" if self.cluster["launcher"] == "kubernetes" else "slurm"
        return float(sections.merged(name, self.cluster, resources).get("exclude_hours", EXCLUDE_HOURS))

    def settings(self, phase: str) -> dict[str, Any]:
        section: dict[str, Any] = self.spec["evaluate"] if phase == EVALUATE else self.spec["phases"][phase]
        return section

    def told(self, phase: str) -> dict[str, Any]:
        """The settings, and the data that the log says is to be jumped over: what an attempt is told."""
        section = self.settings(phase)
        ahead = [{"at": at, "steps": steps} for name, at, steps in self.jumps if name == phase]
        if not ahead:
            return section
        return {**section, "data": {**section["data"], "skip": [*section["data"].get("skip", []), *ahead]}}


# --- the fold ---------------------------------------------------------------------------------------------------------


def fold(log: Iterable[Event]) -> State | None:
    """The state after `log`; None if there is no run. Raises IllegalEvent."""
    state: State | None = None
    for event in log:
        state = apply(state, event)
    return state


def apply(state: State | None, event: Event) -> State:
    """The state after `event`. Raises IllegalEvent, and `state` is what it was."""
    if isinstance(event, RunCreated):
        if state is not None:
            raise IllegalEvent(f"the run is there already: {state.created.run}")
        return _create(event)
    if state is None:
        raise IllegalEvent(f"{type(event).__name__} before RunCreated")
    allowed, transition = TRANSITIONS[type(event)]
    if state.situation not in allowed:
        legal = ", ".join(sorted(allowed))
        raise IllegalEvent(f"{type(event).__name__} cannot follow: the run is {state.situation}, not any of: {legal}")
    return replace(transition(state, event), events=state.events + 1, at=event.at)


def _create(event: RunCreated) -> State:
    fork = event.forked_from
    if fork is not None and not 0 < fork.step <= event.spec["phases"].get(fork.phase, {}).get("steps", 0):
        raise IllegalEvent(f"forked from {fork}, which is not a state of any phase: {list(event.spec['phases'])}")
    return State(event, event.spec, event.cluster, event.spec_digest, event.code_digest, at=event.at)


def _amend(state: State, event: SpecAmended) -> State:
    after = replace(state, spec=event.spec, cluster=event.cluster, spec_digest=event.spec_digest)
    begun = [stage for stage in state.stages if state.has_begun(stage.name)]
    if [stage for stage in after.stages if state.has_begun(stage.name)] != begun or (
        [stage.name for stage in after.stages][: len(begun)] != [stage.name for stage in begun]
    ):
        raise IllegalEvent(f"stages that have begun stay, first and as they are: {[stage.name for stage in begun]}")
    return after


def _intend(state: State, event: AttemptIntended) -> State:
    due = state.next_stage
    if due is None or event.phase != due.name:
        raise IllegalEvent(f"attempt {event.attempt} is of {event.phase}, but {due and due.name} is due")
    if state.attempts and event.attempt <= state.attempts[-1].number:
        raise IllegalEvent(f"attempt {event.attempt} after attempt {state.attempts[-1].number}")
    return replace(state, attempts=(*state.attempts, AttemptState(event)), failure=None)


def _change_live(state: State, number: int, **changes: Any) -> State:
    live = state.live
    if live is None or live.number != number:
        raise IllegalEvent(f"attempt {number} is not under way; {live.number if live else 'none'} is")
    return replace(state, attempts=(*state.attempts[:-1], replace(live, **changes)))


def _launch(state: State, event: AttemptLaunched) -> State:
    return _change_live(state, event.attempt, handle=event.handle)


def _stopping(state: State, event: AttemptStopping) -> State:
    before = state.live.stopping if state.live else None
    if state.desired is Desired.RUNNING:
        raise IllegalEvent("nobody asked this run to stop")
    if before is not None and (before.hard or not event.hard):
        raise IllegalEvent(f"attempt {event.attempt} was asked to stop already")
    return _change_live(state, event.attempt, stopping=event)


def _end(state: State, event: AttemptEnded) -> State:
    after = _change_live(state, event.attempt, end=event)
    phase = after.attempts[-1].phase
    stage = next(stage for stage in state.stages if stage.name == phase)
    if event.steps != sorted(set(event.steps)) or any(step < 1 for step in event.steps):
        raise IllegalEvent(f"steps of attempt {event.attempt} do not ascend from 1: {event.steps}")
    if event.cause is Cause.DONE and not after.is_over(stage):
        raise IllegalEvent(f"attempt {event.attempt} is done without its last step {stage.last}: {event.steps}")
    newest = max((ref.step for ref in state.resume_points(phase, "")), default=0)
    counts = {} if max(event.steps, default=0) > newest or after.is_over(stage) else dict(state.counts)
    if after.is_over(stage) or state.desired is not Desired.RUNNING:
        return replace(after, counts=counts, failure=None)
    counts[event.cause] = counts.get(event.cause, 0) + 1
    return replace(after, counts=counts, failure=event)


def _stop(state: State, event: StopRequested) -> State:
    if state.desired is not Desired.RUNNING and (state.hard or not event.hard):
        raise IllegalEvent("the run was asked to stop already")
    desired = Desired.STOPPED if state.desired is Desired.RUNNING else state.desired
    return replace(state, desired=desired, hard=event.hard)


def _cancel(state: State, event: Cancelled) -> State:
    if state.desired is Desired.CANCELLED:
        raise IllegalEvent("the run was cancelled already")
    return replace(state, desired=Desired.CANCELLED)


def _resume(state: State, event: Resumed) -> State:
    if event.code_digest is not None and state.live:
        raise IllegalEvent(
            f"attempt {state.live.number} runs the old code: stop the run first, then go on with new code"
        )
    if state.live and state.desired is Desired.RUNNING:
        raise IllegalEvent("the run is under way")
    code = event.code_digest or state.code_digest
    jumps = (*state.jumps, _jump(state, event.skip_data)) if event.skip_data is not None else state.jumps
    return replace(
        state, desired=Desired.RUNNING, hard=False, failed=None, counts={}, failure=None, code_digest=code, jumps=jumps
    )


def _jump(state: State, steps: int) -> tuple[str, int, int]:
    """From the last checkpoint of the phase that is due: where its next attempt goes on."""
    due = state.next_stage
    if state.live:
        raise IllegalEvent(f"attempt {state.live.number} is reading its data: stop the run first, then jump over some")
    if due is None or due.last is None:
        raise IllegalEvent("no phase is left whose data could be jumped over")
    if steps < 1:
        raise IllegalEvent(f"the data of {steps} steps cannot be jumped over: 1 or more")
    return due.name, max((ref.step for ref in state.resume_points(due.name, "")), default=0), steps


def _fail(state: State, event: RunFailed) -> State:
    return replace(state, failed=event)


_S = Situation
_LIVE = {_S.INTENDED, _S.LAUNCHED}
TRANSITIONS: dict[type[Any], tuple[set[Situation], Callable[[State, Any], State]]] = {
    SpecAmended: (set(Situation), _amend),
    AttemptIntended: ({_S.IDLE}, _intend),
    AttemptLaunched: ({_S.INTENDED}, _launch),
    AttemptStopping: ({_S.LAUNCHED}, _stopping),
    AttemptEnded: (_LIVE, _end),
    StopRequested: (_LIVE | {_S.IDLE}, _stop),
    Cancelled: (_LIVE | {_S.IDLE, _S.STOPPED, _S.FAILED}, _cancel),
    Resumed: (_LIVE | {_S.IDLE, _S.STOPPED, _S.CANCELLED, _S.FAILED}, _resume),
    RunFailed: ({_S.IDLE}, _fail),
}
"""In which situations each event is legal, and what it makes of the state."""
