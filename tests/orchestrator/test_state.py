"""The fold, without files: legal and illegal events, forks, amendments, old logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from model.contract import EVALUATE, Cause, CheckpointRef
from orchestrator import events as ev
from orchestrator.state import TRANSITIONS, IllegalEvent, Situation, apply, fold
from tests.orchestrator.logs import (
    ALL_DONE,
    CANCELLED,
    FAILED,
    RESUMED,
    attempt,
    created,
    ended,
    intended,
    launched,
    run,
    stop,
    stopping,
)
from tests.orchestrator.pretend import CLUSTER, job_spec, phase

HISTORIES = Path(__file__).parent / "histories"

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


def test_checkpoints_to_go_on_from_are_newest_first() -> None:
    log = [*attempt(1, Cause.CRASHED, [1, 2]), *attempt(2, Cause.KILLED, [2, 3]), *attempt(3, Cause.KILLED, [])]
    refs = run(*log).resume_points("pretrain", "/r")
    assert [(ref.step, ref.attempt) for ref in refs] == [(3, 2), (2, 2), (2, 1), (1, 1)]
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


def test_data_is_jumped_over_from_the_last_checkpoint_on() -> None:
    jump = ev.Resumed(at=0.0, nonce="n", by="test", skip_data=7)
    assert run(stop(), jump).jumps == (("pretrain", 0, 7),)
    state = run(intended(1), launched(1), ended(1, Cause.DIVERGED, [2]), jump)
    assert state.jumps == (("pretrain", 2, 7),)
    assert state.told("pretrain")["data"]["skip"] == [{"at": 2, "steps": 7}]
    assert state.told("gram") == state.settings("gram")
    with pytest.raises(IllegalEvent, match="is reading its data: stop the run first"):
        run(intended(1), launched(1), stop(), jump)
    with pytest.raises(IllegalEvent, match="0 steps cannot be jumped over"):
        run(stop(), ev.Resumed(at=0.0, nonce="n", by="test", skip_data=0))


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
