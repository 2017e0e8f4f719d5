"""Nodes that fail a run: told by the agent or the scheduler, left out for a while, and made up for by fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from model.contract import Cause, Outcome
from orchestrator import attempts, control, events, store
from orchestrator.decide import Close, Seen, decide
from orchestrator.events import AttemptEnded, AttemptIntended
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.spec import read_job, resolved
from orchestrator.state import fold
from tests.orchestrator.logs import attempt, intended, launched, run, stop as stop_asked, stopping
from tests.orchestrator.pretend import Bench, job_spec

HOUR = 3600.0
NODES = ("node1", "node2", "node3", "node4")


def lost(number: int, *nodes: str, at: float = 0.0, phase: str = "pretrain") -> list[events.Event]:
    *before, end = attempt(number, Cause.VANISHED, [], phase, at)
    return [*before, msgspec.structs.replace(end, bad_nodes=list(nodes))]


# --- the scheduler's word ---------------------------------------------------------------------------------------------


def gone(**told: Any) -> Seen:
    return Seen(
        launch=Observation(LaunchState.ENDED, {"pid": 1}, **told), claimed=True, missing_for=9.0, settle_seconds=5.0
    )


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (None, Cause.VANISHED),
        (Cause.UNSEALED, Cause.UNSEALED),
        (Cause.KILLED, Cause.KILLED),
        (Cause.CRASHED, Cause.CRASHED),
        (Cause.DONE, Cause.VANISHED),  # that, only the agent can say
    ],
)
def test_without_an_outcome_the_schedulers_word_counts(told: Cause | None, cause: Cause) -> None:
    action = decide(run(intended(1), launched(1)), gone(cause=told, bad_nodes=("node2",), detail="NODE_FAIL"), 0.0)
    assert action == Close(
        1, cause, "attempt 1 is gone and left no outcome: NODE_FAIL", gone=True, bad_nodes=("node2",)
    )


def test_the_agents_word_counts_before_the_schedulers() -> None:
    outcome = Outcome(cause=Cause.CRASHED, message="m", step=3, bad_nodes=["node4"])
    action = decide(run(intended(1), launched(1)), Seen(outcome=outcome), 0.0)
    assert action == Close(1, Cause.CRASHED, "m", 3, bad_nodes=("node4",))


@pytest.mark.parametrize("claimed", [False, True])
def test_a_job_taken_off_the_queue_as_asked_did_not_vanish(claimed: bool) -> None:
    log = run(intended(1), launched(1), stop_asked(), stopping(1))
    seen = Seen(launch=Observation(LaunchState.ENDED, {}), claimed=claimed, missing_for=9.0, settle_seconds=5.0)
    action = decide(log, seen, 0.0)
    assert isinstance(action, Close)
    assert action.cause is (Cause.VANISHED if claimed else Cause.STOPPED)


# --- leaving them out -------------------------------------------------------------------------------------------------


def test_a_node_that_failed_is_left_out_until_its_time_is_over() -> None:
    state = run(*lost(1, "node2", at=HOUR), *lost(2, "node1", "node2", at=3 * HOUR))
    assert state.excluded(4 * HOUR) == {"node1": 27 * HOUR, "node2": 27 * HOUR}
    assert run(*lost(1, "node2", at=HOUR)).excluded(25 * HOUR - 1) == {"node2": 25 * HOUR}
    assert run(*lost(1, "node2", at=HOUR)).excluded(25 * HOUR) == {}
    assert not run(*attempt(1, Cause.CRASHED, [])).has_lost_nodes


def test_how_long_is_the_jobs_then_the_clusters_word() -> None:
    state = run(*lost(1, "node2"))
    profile = msgspec.structs.replace(state, cluster={"launcher": "slurm", "slurm": {"exclude_hours": 2.0}})
    assert profile.excluded(0.0) == {"node2": 2 * HOUR}
    spec = job_spec()
    spec["phases"]["pretrain"]["resources"]["slurm"] = {"exclude_hours": 0.5}
    assert msgspec.structs.replace(profile, spec=spec).excluded(0.0) == {"node2": HOUR / 2}


def test_the_next_attempt_is_told_what_to_leave_out_by_the_clock_of_the_log(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.end(Cause.VANISHED, ["node2"])
    bench.tick()
    state = control.load(bench.dir())
    built = [attempts.to_yaml(attempts.build(state, bench.dir(), 2, "pretrain")) for _ in range(2)]
    assert built[0] == built[1]
    bench.tick(seconds=10.0)
    assert bench.launcher.job.attempt.exclude == ["node2"]
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick(seconds=30 * HOUR)
    bench.tick(seconds=10.0)
    assert bench.launcher.job.attempt.exclude == []


def test_a_refusal_names_the_nodes_that_were_left_out(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.job.end(Cause.VANISHED, ["node2"])
    bench.tick()
    bench.launcher.refuses = True
    state = bench.tick(seconds=10.0).state
    assert state.failure is not None
    assert state.failure.message == "the launcher refused it (without node2, which failed this run): no such partition"


def test_infrastructure_never_uses_up_what_the_job_may_do_wrong() -> None:
    crash = attempt(22, Cause.CRASHED, [])
    log = [event for number in range(1, 21) for event in lost(number, "node1")]
    assert dict(run(*log, *crash).counts) == {Cause.VANISHED: 20, Cause.CRASHED: 1}
    assert not isinstance(decide(run(*log, *crash), Seen(), 1e6), Close)


def test_a_log_of_an_older_version_still_folds() -> None:
    old = (
        b'{"event":"AttemptIntended","at":0.0,"nonce":"n","attempt":1,"phase":"pretrain","launch_name":"x","digest":"d",'
        b'"owner":"h/b/1/1.0/n","lease_until":60.0}',
        b'{"event":"AttemptLaunched","at":0.0,"nonce":"n","attempt":1,"handle":{"pid":1}}',
        b'{"event":"AttemptEnded","at":5.0,"nonce":"n","attempt":1,"cause":"vanished","message":"m","steps":[2],"reached":3}',
    )
    state = fold([run().created, *(events.decode(line, "old") for line in old)])
    assert state is not None
    assert (state.attempts[0].intent.nodes, state.excluded(5.0), state.at) == (None, {}, 5.0)


# --- fewer nodes ------------------------------------------------------------------------------------------------------


VALID = Path(__file__).parent / "valid.yaml"


def wide(min_nodes: int | None = 1, batch_size: int = 24) -> dict[str, Any]:
    """A real phase over four nodes of two processes."""
    job = read_job(str(VALID), ["phases.pretrain.resources.nodes=2"], check_data=False)
    pretrain = resolved(job)["phases"]["pretrain"]
    pretrain["optim"] |= {"batch_size": batch_size, "group_size": 1}
    pretrain["losses"]["koleo"]["weight"] = 0.0
    pretrain["resources"] |= {"nodes": 4, "min_nodes": min_nodes}
    return {**job_spec(), "phases": {"pretrain": pretrain}, "evaluate": None}


def after_losing(bench: Bench, *nodes: str, cause: Cause = Cause.VANISHED, seconds: float = 10.0) -> int:
    """The nodes that the next attempt asks for."""
    bench.launcher.down = set(nodes)
    bench.launcher.job.end(cause, nodes)
    bench.tick(seconds=seconds)
    bench.tick(seconds=30.0)
    return bench.launcher.job.attempt.nodes


def test_after_a_node_was_lost_the_largest_number_that_fits_goes_on_and_then_all_again(bench: Bench) -> None:
    bench.launcher.there = NODES
    bench.submit(wide())
    bench.tick()
    assert bench.launcher.job.attempt.nodes == 4
    assert after_losing(bench, "node2") == 3
    assert bench.launcher.job.attempt.settings["resources"]["nodes"] == 4, "the same phase, the same global batch"
    assert [e.nodes for e in store.read(bench.dir()) if isinstance(e, AttemptIntended)] == [4, 3]
    bench.launcher.down.clear()
    bench.launcher.job.end(Cause.STOPPED)
    bench.tick()
    bench.tick(seconds=10.0)
    assert bench.launcher.job.attempt.nodes == 3, "it is back, but left out for a day"
    assert after_losing(bench, cause=Cause.STOPPED, seconds=25 * HOUR) == 4


def test_a_number_whose_yaml_is_for_other_nodes_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its controller died before the intent; by now the node is back."""
    bench.launcher.there, bench.launcher.down = NODES, {"node2"}
    bench.submit(wide())
    bench.tick()
    bench.launcher.job.end(Cause.VANISHED, ["node2"])
    bench.tick()
    with monkeypatch.context() as patch:
        patch.setattr(store, "append", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.tick(seconds=10.0)
    bench.launcher.there = (*NODES, "node5")
    bench.launcher.down.clear()
    bench.tick()
    attempt = bench.launcher.job.attempt
    assert (attempt.attempt, attempt.nodes, attempt.exclude) == (3, 4, ["node2"])


@pytest.mark.parametrize(
    ("min_nodes", "batch_size", "down", "nodes"),
    [
        (1, 16, NODES[:1], 2),  # three nodes cannot share 16 images
        (3, 24, NODES[:3], 3),  # fewer than it may go on with: it waits for those
        (1, 24, NODES[:3], 1),
        (None, 24, NODES[:1], 4),
    ],
)
def test_how_few(bench: Bench, min_nodes: int | None, batch_size: int, down: tuple[str, ...], nodes: int) -> None:
    bench.launcher.there = NODES
    bench.submit(wide(min_nodes, batch_size))
    bench.tick()
    assert after_losing(bench, *down) == nodes


def test_a_launcher_that_does_not_say_how_many_there_are_is_asked_for_all(bench: Bench) -> None:
    bench.submit(wide())
    bench.tick()
    assert after_losing(bench, "node1") == 4


def test_nodes_that_are_down_make_no_run_smaller_that_has_lost_none(bench: Bench) -> None:
    bench.launcher.there, bench.launcher.down = NODES, {"node1"}
    bench.submit(wide())
    bench.tick()
    assert bench.launcher.job.attempt.nodes == 4


def test_a_recorded_phase_that_this_version_cannot_read_is_said(bench: Bench) -> None:
    bench.launcher.there = NODES
    spec = wide()
    spec["phases"]["pretrain"]["of_a_newer_version"] = True
    bench.submit(spec)
    bench.tick()
    bench.launcher.down = {"node1"}
    bench.launcher.job.end(Cause.VANISHED, ["node1"])
    bench.tick()
    state = bench.tick(seconds=30.0).state
    assert state.failed is not None
    assert "amend min_nodes to null" in state.failed.message


def test_the_ends_in_the_log_name_the_nodes(bench: Bench) -> None:
    bench.submit()
    bench.tick()
    bench.launcher.told = {"cause": Cause.VANISHED, "bad_nodes": ("node3", "node1"), "detail": "NODE_FAIL"}
    bench.launcher.job.running = False
    this = bench.controller()
    bench.tick(this)
    bench.tick(this, 6.0)
    (end,) = (event for event in store.read(bench.dir()) if isinstance(event, AttemptEnded))
    assert (end.cause, end.bad_nodes) == (Cause.VANISHED, ["node1", "node3"])
