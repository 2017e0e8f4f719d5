"""The fold and the decision, without files: legal and illegal events, budgets, stops, lost attempts, old logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract import EVALUATE, Cause, CheckpointRef, Outcome
from orchestrator import events as ev
from orchestrator.decide import (
    GRACE_SECONDS,
    Adopt,
    AskToStop,
    Close,
    Fail,
    Launch,
    Rest,
    Seen,
    Wait,
    decide,
    end_of,
    missing_since,
)
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.state import TRANSITIONS, IllegalEvent, Situation, State, apply, fold
from tests.orchestrator.pretend import CLUSTER, job_spec, phase

RUN_ID = "0123456789abcdef" * 2
HISTORIES = Path(__file__).parent / "histories"


def created(fork: CheckpointRef | None = None, spec: dict[str, Any] | None = None) -> ev.RunCreated:
    return ev.RunCreated(
        at=0.0, nonce="n", format=1, run="demo", run_id=RUN_ID, spec=spec or job_spec(), cluster=CLUSTER,
        spec_digest="s", code_digest="c", version="0", forked_from=fork,
    )  # fmt: skip


def intended(number: int, phase: str = "pretrain", lease_until: float = 60.0) -> ev.AttemptIntended:
    return ev.AttemptIntended(
        at=0.0, nonce="n", attempt=number, phase=phase, launch_name=f"demo-01234567-{phase}-{number}", digest="d",
        owner="h/b/1/1.0/n", lease_until=lease_until,
    )  # fmt: skip


def launched(number: int) -> ev.AttemptLaunched:
    return ev.AttemptLaunched(at=0.0, nonce="n", attempt=number, handle={"pid": 1})


def ended(number: int, cause: Cause, steps: list[int], at: float = 0.0) -> ev.AttemptEnded:
    return ev.AttemptEnded(at=at, nonce="n", attempt=number, cause=cause, message="m", steps=steps, reached=None)


def stop(hard: bool = False) -> ev.StopRequested:
    return ev.StopRequested(at=0.0, nonce="n", by="test", hard=hard)


def stopping(number: int, hard: bool = False, at: float = 0.0) -> ev.AttemptStopping:
    return ev.AttemptStopping(at=at, nonce="n", attempt=number, hard=hard)


CANCELLED = ev.Cancelled(at=0.0, nonce="n", by="test")
RESUMED = ev.Resumed(at=0.0, nonce="n", by="test")
FAILED = ev.RunFailed(at=0.0, nonce="n", cause=Cause.CRASHED, message="m")


def run(*log: ev.Event, fork: CheckpointRef | None = None) -> State:
    state = fold([created(fork), *log])
    assert state is not None
    return state


def attempt(number: int, cause: Cause, steps: list[int], phase: str = "pretrain", at: float = 0.0) -> list[ev.Event]:
    return [intended(number, phase), launched(number), ended(number, cause, steps, at)]


def seen(state: LaunchState, missing_for: float | None = None, **more: Any) -> Seen:
    return Seen(launch=Observation(state, {"pid": 1}), missing_for=missing_for, settle_seconds=5.0, **more)


ALL_DONE = [
    *attempt(1, Cause.DONE, [2, 4]),
    *attempt(2, Cause.DONE, [2, 4], "gram"),
    *attempt(3, Cause.DONE, [2, 4], "text"),
    *attempt(4, Cause.DONE, [], EVALUATE),
]

# --- the fold ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "situation", "status"),
    [
        ([], Situation.IDLE, "running"),
        ([intended(1)], Situation.INTENDED, "running"),
        ([intended(1), launched(1)], Situation.LAUNCHED, "running"),
        (attempt(1, Cause.CRASHED, [2]), Situation.IDLE, "running"),
        ([intended(1), launched(1), stop()], Situation.LAUNCHED, "running"),
        ([intended(1), stop(), ended(1, Cause.NOT_LAUNCHED, [])], Situation.STOPPED, "stopped"),
        ([stop()], Situation.STOPPED, "stopped"),
        ([stop(), CANCELLED], Situation.CANCELLED, "cancelled"),
        ([stop(), RESUMED], Situation.IDLE, "running"),
        ([FAILED], Situation.FAILED, "failed"),
        ([FAILED, RESUMED], Situation.IDLE, "running"),
        ([FAILED, CANCELLED], Situation.CANCELLED, "cancelled"),
        (ALL_DONE, Situation.DONE, "done"),
        ([*ALL_DONE[:-1], stop(), ALL_DONE[-1]], Situation.DONE, "done"),
    ],
)
def test_situation_and_status(log: list[ev.Event], situation: Situation, status: str) -> None:
    state = run(*log)
    assert (state.situation, state.status) == (situation, status)
    assert state.events == len(log) + 1


@pytest.mark.parametrize(
    ("log", "event", "why"),
    [
        ([], created(), "there already"),
        ([], launched(1), "cannot follow"),
        ([], intended(1, "gram"), "pretrain is due"),
        ([intended(1)], intended(2), "cannot follow"),
        ([intended(1)], launched(2), "not under way"),
        ([intended(1)], stopping(1), "cannot follow"),
        ([intended(1), launched(1)], stopping(1), "nobody asked"),
        ([intended(1), launched(1), stop(), stopping(1)], stopping(1), "already"),
        ([intended(1), launched(1), stop(True), stopping(1, True)], stopping(1, True), "already"),
        ([intended(1), launched(1)], ended(1, Cause.DONE, [2]), "without its last step"),
        ([intended(1), launched(1)], ended(1, Cause.CRASHED, [4, 2]), "ascend"),
        (attempt(1, Cause.CRASHED, []), intended(1), "after attempt 1"),
        (attempt(1, Cause.DONE, [4]), intended(2), "gram is due"),
        ([stop()], stop(), "cannot follow"),
        ([intended(1), stop()], stop(), "already"),
        ([intended(1), launched(1)], RESUMED, "under way"),
        ([intended(1), CANCELLED], CANCELLED, "already"),
        ([stop()], FAILED, "cannot follow"),
        (ALL_DONE, CANCELLED, "cannot follow"),
        (ALL_DONE, RESUMED, "cannot follow"),
        (ALL_DONE, intended(5, EVALUATE), "cannot follow"),
    ],
)
def test_an_illegal_event_says_why_and_changes_nothing(log: list[ev.Event], event: ev.Event, why: str) -> None:
    state = run(*log)
    before = copy.deepcopy(state)
    with pytest.raises(IllegalEvent, match=why):
        apply(state, event)
    assert state == before


def test_nothing_comes_before_the_first_event() -> None:
    with pytest.raises(IllegalEvent, match="before RunCreated"):
        apply(None, stop())


def test_every_event_but_the_first_is_in_the_table() -> None:
    assert {*TRANSITIONS, ev.RunCreated} == set(ev.Event.__args__)


ANY_EVENT = st.one_of(
    st.builds(intended, st.integers(1, 6), st.sampled_from(["pretrain", "gram", "text", EVALUATE])),
    st.builds(launched, st.integers(1, 6)),
    st.builds(stopping, st.integers(1, 6), st.booleans()),
    st.builds(
        ended, st.integers(1, 6), st.sampled_from(list(Cause)), st.lists(st.integers(1, 4), unique=True).map(sorted)
    ),
    st.builds(stop, st.booleans()),
    st.sampled_from([CANCELLED, RESUMED, FAILED]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANY_EVENT, max_size=60))
def test_any_sequence_leaves_a_sound_state(candidates: list[ev.Event]) -> None:
    state = run()
    log: list[ev.Event] = [created()]
    for event in candidates:
        before = copy.deepcopy(state)
        try:
            after = apply(state, event)
        except IllegalEvent:
            assert state == before
            continue
        log.append(event)
        assert sum(attempt.end is None for attempt in after.attempts) <= 1
        for name, steps in state.accepted().items():
            assert set(steps) <= set(after.accepted()[name]), "a checkpoint that counted no longer does"
        names = [stage.name for stage in after.stages]
        order = [names.index(attempt.phase) for attempt in after.attempts]
        assert order == sorted(order)
        state = after
    assert fold(log) == state


def test_a_phase_is_over_once_its_last_step_counts_however_the_attempt_ended() -> None:
    state = run(*attempt(1, Cause.KILLED, [2, 4]))
    assert state.next_stage is not None
    assert state.next_stage.name == "gram"
    assert state.failure is None


def test_checkpoints_to_go_on_from_are_newest_first_and_few() -> None:
    log = [*attempt(1, Cause.CRASHED, [1, 2]), *attempt(2, Cause.KILLED, [2, 3]), *attempt(3, Cause.KILLED, [])]
    refs = run(*log).resume_points("pretrain", "/r")
    assert [(ref.step, ref.attempt) for ref in refs] == [(3, 2), (2, 2), (2, 1)]
    assert run().resume_points("pretrain", "/r") == []


# --- forks and amendments ---------------------------------------------------------------------------------------------

FORK = CheckpointRef(run="/old", phase="gram", attempt=7, step=2)


def test_a_fork_begins_in_the_middle() -> None:
    state = run(fork=FORK)
    assert state.next_stage is not None
    assert state.next_stage.name == "gram"
    assert state.resume_points("gram", "/new") == [FORK]
    assert [state.is_inherited(*of) for of in [("pretrain", 2), ("gram", 2), ("gram", 4), ("gram", None)]] == [
        True, True, False, False,
    ]  # fmt: skip
    assert [state.has_begun(name) for name in ("pretrain", "gram", "text", EVALUATE)] == [True, True, False, False]


def test_a_fork_at_the_last_step_takes_that_phase_as_over() -> None:
    state = run(fork=CheckpointRef(run="/old", phase="gram", attempt=7, step=4))
    assert state.next_stage is not None
    assert state.next_stage.name == "text"


def test_a_fork_goes_on_from_its_own_checkpoints_first() -> None:
    state = run(*attempt(1, Cause.CRASHED, [3], "gram"), fork=FORK)
    assert [(ref.run, ref.step) for ref in state.resume_points("gram", "/new")] == [("/new", 3), ("/old", 2)]


def test_a_fork_from_beyond_the_phase_is_illegal() -> None:
    with pytest.raises(IllegalEvent, match="not a state of any phase"):
        run(fork=CheckpointRef(run="/old", phase="gram", attempt=7, step=5))


def amended(spec: dict[str, Any]) -> ev.SpecAmended:
    return ev.SpecAmended(at=0.0, nonce="n", spec=spec, cluster=CLUSTER, spec_digest="t", changed=[])


def test_an_amendment_may_change_what_has_not_begun() -> None:
    spec = job_spec()
    spec["phases"]["text"]["steps"] = 10
    spec["phases"]["more"] = phase("text", 3)
    state = run(*attempt(1, Cause.DONE, [4]), amended(spec))
    assert [(stage.name, stage.last) for stage in state.stages][2:] == [("text", 10), ("more", 3), (EVALUATE, None)]
    assert state.spec_digest == "t"


@pytest.mark.parametrize("how", ["steps", "removed", "order", "before"])
def test_an_amendment_leaves_what_has_begun(how: str) -> None:
    spec = job_spec()
    if how == "steps":
        spec["phases"]["pretrain"]["steps"] = 8
    elif how == "removed":
        del spec["phases"]["pretrain"]
    elif how == "order":
        spec["phases"] = dict(reversed(spec["phases"].items()))
    else:
        spec["phases"] = {"new": phase("pretrain"), **spec["phases"]}
    with pytest.raises(IllegalEvent, match="stages that have begun stay"):
        run(intended(1), amended(spec))


def test_new_code_waits_until_nothing_runs() -> None:
    new = ev.Resumed(at=0.0, nonce="n", by="test", code_digest="new")
    with pytest.raises(IllegalEvent, match="stop the run first"):
        run(intended(1), launched(1), stop(), new)
    assert run(stop(), new).code_digest == "new"


# --- decisions --------------------------------------------------------------------------------------------------------


def test_the_first_stage_is_launched_then_the_next_then_nothing() -> None:
    assert decide(run(), Seen(), 0.0) == Launch(1, "pretrain")
    assert decide(run(*attempt(1, Cause.DONE, [4])), Seen(), 0.0) == Launch(2, "gram")
    assert decide(run(*ALL_DONE), Seen(), 0.0) == Rest(Situation.DONE)


@pytest.mark.parametrize("log", [[stop()], [CANCELLED], [FAILED]])
def test_a_run_at_rest_is_left_alone(log: list[ev.Event]) -> None:
    assert isinstance(decide(run(*log), Seen(), 0.0), Rest)


def test_an_outcome_ends_the_attempt_whatever_the_launcher_says() -> None:
    outcome = Outcome(cause=Cause.STOPPED, message="sealed 2", step=2)
    for log in ([intended(1)], [intended(1), launched(1)]):
        action = decide(run(*log), seen(LaunchState.RUNNING, outcome=outcome), 0.0)
        assert action == Close(1, Cause.STOPPED, "sealed 2", 2)


def test_unknown_decides_nothing() -> None:
    for log in ([intended(1)], [intended(1), launched(1)], [intended(1), launched(1), stop()]):
        action = decide(run(*log), seen(LaunchState.UNKNOWN, missing_for=1e9, owner_gone=True), 1e9)
        assert isinstance(action, Wait)


def test_an_intended_attempt_that_is_found_is_adopted() -> None:
    for found in (LaunchState.PENDING, LaunchState.RUNNING, LaunchState.ENDED):
        assert decide(run(intended(1)), seen(found), 0.0) == Adopt(1, {"pid": 1})


def test_an_intended_attempt_is_its_owners_until_the_lease_ends() -> None:
    state = run(intended(1, lease_until=60.0))
    assert isinstance(decide(state, seen(LaunchState.ABSENT, missing_for=100.0), 59.0), Wait)
    assert isinstance(decide(state, seen(LaunchState.ABSENT, missing_for=4.0), 61.0), Wait)
    for free in ({"missing_for": 5.0}, {"missing_for": 5.0, "owner_gone": True}):
        action = decide(state, seen(LaunchState.ABSENT, **free), 61.0 if len(free) == 1 else 1.0)
        assert isinstance(action, Close)
        assert (action.cause, action.gone) == (Cause.NOT_LAUNCHED, True)


def test_a_claim_shows_that_it_was_launched() -> None:
    action = decide(run(intended(1)), seen(LaunchState.ABSENT, missing_for=5.0, claimed=True), 61.0)
    assert isinstance(action, Close)
    assert action.cause is Cause.VANISHED


@pytest.mark.parametrize("state", [LaunchState.ABSENT, LaunchState.ENDED])
def test_a_lost_attempt_is_looked_for_twice(state: LaunchState) -> None:
    log = run(intended(1), launched(1))
    assert isinstance(decide(log, seen(state), 0.0), Wait)
    assert isinstance(decide(log, seen(state, missing_for=4.9), 0.0), Wait)
    action = decide(log, seen(state, missing_for=5.0), 0.0)
    assert isinstance(action, Close)
    assert (action.cause, action.gone) == (Cause.VANISHED, True)


def test_missing_counts_only_looks_that_show_something() -> None:
    attempt = run(intended(1, lease_until=60.0)).attempts[0]
    assert missing_since(None, attempt, seen(LaunchState.ABSENT), 10.0) is None, "its owner may still submit it"
    assert missing_since(None, attempt, seen(LaunchState.ABSENT, owner_gone=True), 10.0) == 10.0
    assert missing_since(None, attempt, seen(LaunchState.ABSENT), 61.0) == 61.0
    assert missing_since(61.0, attempt, seen(LaunchState.UNKNOWN), 63.0) == 61.0
    assert missing_since(61.0, attempt, seen(LaunchState.ABSENT), 66.0) == 61.0
    assert missing_since(61.0, attempt, seen(LaunchState.RUNNING), 66.0) is None


def test_an_attempt_closed_by_a_controller_that_died_is_ended() -> None:
    action = decide(run(intended(1), launched(1)), seen(LaunchState.RUNNING, closed=True), 0.0)
    assert isinstance(action, Close)
    assert (action.cause, action.gone) == (Cause.VANISHED, True)


def test_a_stop_is_asked_for_once_then_waited_for_then_enforced() -> None:
    running = seen(LaunchState.RUNNING)
    assert decide(run(intended(1), launched(1), stop()), running, 0.0) == AskToStop(1, hard=False)
    asked = run(intended(1), launched(1), stop(), stopping(1, at=100.0))
    assert isinstance(decide(asked, running, 100.0 + 5.0 + GRACE_SECONDS), Wait)
    assert decide(asked, running, 101.0 + 5.0 + GRACE_SECONDS) == AskToStop(1, hard=True)
    at_once = run(intended(1), launched(1), stop(), stopping(1), stop(hard=True))
    assert decide(at_once, running, 0.0) == AskToStop(1, hard=True)
    again = apply(at_once, stopping(1, hard=True))
    assert decide(again, running, 0.0) == AskToStop(1, hard=True, again=True)


def test_a_cancel_stops_the_attempt_the_same_way() -> None:
    running = seen(LaunchState.RUNNING)
    assert decide(run(intended(1), launched(1), CANCELLED), running, 0.0) == AskToStop(1, hard=False)


def test_an_attempt_ended_at_once_as_asked_did_not_vanish() -> None:
    state = run(intended(1), launched(1), stop(hard=True), stopping(1, hard=True))
    action = decide(state, seen(LaunchState.ENDED, missing_for=5.0), 0.0)
    assert isinstance(action, Close)
    assert action.cause is Cause.UNSEALED


def test_done_without_the_last_checkpoint_is_a_crash() -> None:
    state = run(intended(1), launched(1))
    end = end_of(state, Close(1, Cause.DONE, "done", 4), [2], 0.0, "n")
    assert end.cause is Cause.CRASHED
    assert "checkpoint 4 is not sealed" in end.message
    assert end_of(state, Close(1, Cause.DONE, "done", 4), [2, 4], 0.0, "n").cause is Cause.DONE


# --- budgets ----------------------------------------------------------------------------------------------------------


def crashes(*sealed: list[int], cause: Cause = Cause.CRASHED) -> State:
    log = [event for number, steps in enumerate(sealed, 1) for event in attempt(number, cause, steps, at=100.0)]
    return run(*log)


def test_a_crash_is_tried_again_after_a_growing_pause_and_then_fails() -> None:
    assert decide(crashes([]), Seen(), 100.5) == Wait(0.5, "crashed: the next try is due in 0 s")
    assert decide(crashes([]), Seen(), 101.0) == Launch(2, "pretrain")
    assert isinstance(decide(crashes([], []), Seen(), 101.5), Wait)
    assert decide(crashes([], []), Seen(), 102.0) == Launch(3, "pretrain")
    action = decide(crashes([], [], []), Seen(), 100.0)
    assert isinstance(action, Fail)
    assert "3 times without progress" in action.message


def test_progress_makes_the_budget_fresh() -> None:
    assert isinstance(decide(crashes([], [], [1]), Seen(), 200.0), Launch)
    assert isinstance(decide(crashes([1], [2], [3]), Seen(), 200.0), Launch)
    assert isinstance(decide(crashes([2], [2], [1], [2]), Seen(), 200.0), Fail), "the same step again is none"


def test_causes_have_budgets_of_their_own() -> None:
    log = [*attempt(1, Cause.CRASHED, []), *attempt(2, Cause.KILLED, []), *attempt(3, Cause.CRASHED, [])]
    assert dict(run(*log).counts) == {Cause.CRASHED: 2, Cause.KILLED: 1}
    assert isinstance(decide(run(*log), Seen(), 200.0), Launch)


def test_preemption_is_never_counted_out() -> None:
    assert isinstance(decide(crashes(*[[]] * 40, cause=Cause.STOPPED), Seen(), 1e6), Launch)


def test_what_cannot_be_mended_fails_at_once_even_after_progress() -> None:
    assert isinstance(decide(crashes([1], cause=Cause.DIVERGED), Seen(), 200.0), Fail)


def test_an_end_that_was_asked_for_is_not_a_failure() -> None:
    state = run(intended(1), launched(1), stop(), ended(1, Cause.CRASHED, []), RESUMED)
    assert dict(state.counts) == {}
    assert decide(state, Seen(), 0.0) == Launch(2, "pretrain")


def test_resume_makes_the_budgets_fresh() -> None:
    state = apply(apply(crashes([], [], []), FAILED), RESUMED)
    assert decide(state, Seen(), 0.0) == Launch(4, "pretrain")


def test_another_machines_clock_ahead_of_ours_is_not_waited_for() -> None:
    assert decide(crashes([]), Seen(), 0.0) == Launch(2, "pretrain")


# --- old logs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(HISTORIES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_histories_replay(file: Path) -> None:
    """Logs that earlier versions wrote are read today, to the status that their file's name says."""
    lines = file.read_bytes().splitlines()
    state = fold(ev.decode(line, f"{file.name}:{number}") for number, line in enumerate(lines, 1))
    assert state is not None
    assert state.status == file.stem.split("_")[0]


def test_there_are_recorded_histories() -> None:
    assert len(list(HISTORIES.glob("*.jsonl"))) >= 3
