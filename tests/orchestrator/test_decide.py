"""The decision, without files: launches, lost attempts, stops, budgets."""

from __future__ import annotations

import msgspec
import pytest

from model.contract import Cause, Outcome
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
from orchestrator.launchers.base import LaunchState
from orchestrator.state import Situation, State, apply, fold
from tests.orchestrator.logs import (
    ALL_DONE,
    CANCELLED,
    FAILED,
    RESUMED,
    attempt,
    ended,
    intended,
    launched,
    run,
    seen,
    stop,
    stopping,
)


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


def test_half_a_gang_is_tried_again_any_number_of_times_and_two_runs_do_not_do_it_in_step() -> None:
    def left(state: State) -> float:
        action = decide(state, Seen(), 0.0)
        assert isinstance(action, Wait)
        return action.seconds

    def apart(run_id: str) -> float:
        created = ev.RunCreated(**{**msgspec.structs.asdict(run().created), "run_id": run_id})
        return left(fold([created, *attempt(1, Cause.UNPLACED, [])]))

    for count in range(1, 30):
        log = [event for number in range(1, count + 1) for event in attempt(number, Cause.UNPLACED, [])]
        whole = min(15.0 * 2 ** (count - 1), 600.0)
        assert 0.5 * whole <= left(run(*log)) <= 1.5 * whole
    assert len({apart(f"{number:032x}") for number in range(20)}) == 20
    assert apart("0" * 32) == apart("0" * 32)


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
