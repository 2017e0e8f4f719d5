"""Controllers that die, two at once, and what a cluster does to a job behind their backs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from model import storage
from model.contract import EVALUATE, Cause, closed_file
from orchestrator import control, store
from orchestrator.decide import Rest, Wait
from tests.orchestrator.pretend import Bench, Job, PretendLauncher, job_spec, phase

REPOSITORY = Path(__file__).parents[2]


class Died(BaseException):
    """A controller was killed."""


def kill_in_submit(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    submit = PretendLauncher.submit

    def die(launcher: PretendLauncher, *args: Any) -> dict[str, Any]:
        if not before:
            submit(launcher, *args)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(PretendLauncher, "submit", die)
        with pytest.raises(Died):
            bench.tick()


def test_a_crash_between_intent_and_launch_is_looked_up_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit()
    kill_in_submit(bench, monkeypatch, before=True)
    this = bench.controller()
    assert isinstance(bench.tick(this).action, Wait), "its lease still runs"
    assert isinstance(bench.tick(this, 61.0).action, Wait), "first look"
    state = bench.tick(this, 6.0).state
    assert state.attempts[0].end is not None
    assert state.attempts[0].end.cause is Cause.NOT_LAUNCHED
    assert not bench.launcher.jobs
    assert bench.drive().status == "done"


def test_a_dead_owners_lease_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit()
    kill_in_submit(bench, monkeypatch, before=True)
    monkeypatch.setattr(store, "process_is_there", lambda *of: False)
    this = bench.controller()
    bench.tick(this)
    assert bench.tick(this, 6.0).state.attempts[0].end is not None


def test_a_crash_after_the_launch_is_adopted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit()
    bench.launcher.lag = 4.0
    kill_in_submit(bench, monkeypatch, before=False)
    monkeypatch.setattr(store, "process_is_there", lambda *of: False)
    this = bench.controller()
    assert isinstance(bench.tick(this, 1.0).action, Wait), "not in sight yet"
    state = bench.tick(this, 5.0).state
    assert state.live is not None
    assert state.live.status == "launched"
    assert len(bench.launcher.jobs) == 1
    assert bench.drive().status == "done"


@pytest.mark.parametrize("closed", [False, True])
def test_a_launch_that_another_controller_saw_first(bench: Bench, closed: bool) -> None:
    """Adopted before its launcher could say so, and even given up by then."""
    bench.submit()
    other = bench.controller()
    submit = bench.launcher.submit

    def slow(*args: Any) -> dict[str, Any]:
        handle = submit(*args)
        bench.tick(other)
        if closed:
            bench.launcher.job.end(Cause.STOPPED)
            bench.tick(other)
        return handle

    bench.launcher.submit = slow  # type: ignore[method-assign]
    state = bench.tick().state
    assert [attempt.status for attempt in state.attempts] == ["ended" if closed else "launched"]
    assert bench.launcher.job.running is not closed


def test_a_number_whose_yaml_is_of_an_older_spec_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit()
    with monkeypatch.context() as patch:
        patch.setattr(store, "append", lambda *of: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            bench.tick()
    spec = job_spec()
    spec["phases"]["pretrain"]["health"]["stall_seconds"] = 5.0
    assert bench.submit(spec, amending=True).what == "amended"
    bench.tick()
    assert bench.launcher.job.attempt.attempt == 2
    assert bench.launcher.job.attempt.settings["health"]["stall_seconds"] == 5.0


def test_what_is_sealed_once_the_attempt_is_closed_is_looked_for_after_that(bench: Bench) -> None:
    """The controller that closed it died before the event. A worker that looked just before goes on: it seals a last
    time and removes what that makes old. Had the close said what counts, it would name what is gone."""
    bench.submit()
    bench.tick()
    job = bench.launcher.job
    job.train(2)
    storage.publish(f"{bench.dir()}/{closed_file(1)}", b"{}")
    job.seal(4)
    storage.remove_tree(f"{bench.dir()}/checkpoints/pretrain/1/2")
    state = bench.tick().state
    assert state.accepted() == {"pretrain": [(1, 4)]}
    assert not bench.launcher.jobs[0].running
    job.seal(3)  # after the event nothing counts
    assert control.load(bench.dir()).accepted() == {"pretrain": [(1, 4)]}


DRIVER = """
import os, sys, time
from orchestrator import code, control
from orchestrator.launchers.base import LaunchState, Observation
from model import storage
from model.contract import Cause, Outcome, encode, manifest_file, outcome_file
from pathlib import Path

run_dir, jobs = sys.argv[1], Path(sys.argv[2])

class FinishesAtOnce:
    '''A stand-in whose jobs are over when they are submitted; each submission leaves a file.'''
    def submit(self, attempt, digest):
        (jobs / f"{attempt.launch_name}.{os.getpid()}").touch(exist_ok=False)
        if attempt.phase != "evaluate":
            for step in range((attempt.resume[0].step if attempt.resume else 0) + 1, attempt.settings["steps"] + 1):
                storage.publish(f"{run_dir}/{manifest_file(attempt.phase, attempt.attempt, step)}", b"{}")
        outcome = Outcome(cause=Cause.DONE, message="", step=None)
        storage.publish(f"{run_dir}/{outcome_file(attempt.attempt)}", encode(outcome))
        return {}
    def observe(self, queries):
        found = [list(jobs.glob(f"{query.launch_name}.*")) for query in queries]
        return [Observation(LaunchState.ENDED if there else LaunchState.ABSENT) for there in found]
    def cancel(self, query, *, hard):
        pass
    def clear(self, queries):
        pass
    def usable_nodes(self, resources, exclude):
        return None

this = control.controller(run_dir, lambda cluster: FinishesAtOnce(), command="test")
end = time.time() + 50
while (result := control.tick(this, time.time())).state.status == "running" and time.time() < end:
    time.sleep(min(result.pause, 0.05))
print(result.state.status)
"""


def test_two_controllers_on_one_run_launch_each_stage_once(bench: Bench, tmp_path: Path) -> None:
    spec = job_spec()
    spec["phases"] |= {f"more{number}": phase("text", 2, vision_tower="gram@final") for number in range(6)}
    bench.submit(spec)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    command = [sys.executable, "-P", str(tmp_path / "driver.py"), bench.dir(), str(tmp_path / "jobs")]
    drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for _ in range(2)]
    assert [driver.communicate(timeout=60)[0].strip() for driver in drivers] == ["done", "done"]
    state = control.load(bench.dir())
    assert [attempt.phase for attempt in state.attempts] == [*spec["phases"], EVALUATE]
    submitted = sorted(file.name.rsplit(".", 1)[0] for file in (tmp_path / "jobs").iterdir())
    assert submitted == sorted(attempt.intent.launch_name for attempt in state.attempts)


# --- what a cluster does to a job -------------------------------------------------------------------------------------


def test_a_submit_without_an_answer_is_looked_up_and_adopted(bench: Bench) -> None:
    bench.submit()
    bench.launcher.mute = True
    bench.launcher.lag = 3.0
    this = bench.controller()
    assert bench.tick(this).state.live is not None
    assert isinstance(bench.tick(this).action, Wait)
    state = bench.tick(this, 5.0).state
    assert [attempt.status for attempt in state.attempts] == ["launched"]
    bench.launcher.mute = False
    assert bench.drive().status == "done"
    assert len(bench.launcher.jobs) == 4


def test_a_job_that_the_site_requeued_is_cancelled_and_the_next_attempt_goes_on(bench: Bench) -> None:
    """Its first incarnation is over and the second may not train: its claim is taken."""
    bench.submit()
    bench.tick()
    job = bench.launcher.job
    job.train(2)
    job.running, job.requeued = False, True
    this = bench.controller()
    bench.tick(this)
    assert bench.tick(this, 6.0).state.attempts[0].status == "ended"
    assert (job.asked, job.requeued) == (["hard"], False)
    bench.tick(this, 10.0)
    assert [ref.step for ref in bench.launcher.job.attempt.resume] == [2]


def requeued_after_its_end(bench: Bench) -> Job:
    """The job of a first attempt that said its end, and waits in the queue again."""
    bench.submit()
    bench.tick()
    job = bench.launcher.job
    job.train(2)
    job.end(Cause.STOPPED)
    job.requeued = True
    return job


def test_what_waits_under_the_name_of_an_attempt_that_said_its_end_is_taken_off_the_queue(bench: Bench) -> None:
    job = requeued_after_its_end(bench)
    bench.tick()
    assert (job.requeued, job.running, job.asked) == (False, True, []), "its agent is in its last act"
    job.requeued = True  # the site was slow
    bench.tick(seconds=10.0)
    assert len(bench.launcher.jobs) == 2
    assert not job.requeued


@pytest.mark.parametrize("same", [True, False])
def test_what_a_cluster_that_did_not_answer_left_behind_is_taken_off_later(bench: Bench, *, same: bool) -> None:
    """By the same process with its next tick, by another with the next that it has to do."""
    first = requeued_after_its_end(bench)
    this = bench.controller()
    bench.launcher.blind = True
    bench.tick(this)
    bench.tick(this, seconds=10.0)
    assert len(bench.launcher.jobs) == 2
    assert first.requeued
    assert this.uncleared == ["no answer"]
    bench.launcher.blind = False
    if not same:
        this = bench.controller()
        bench.launcher.job.end(Cause.STOPPED)
    bench.tick(this, seconds=20.0)
    assert not first.requeued
    assert this.uncleared == []


def test_what_is_left_of_a_run_that_is_over_a_tick_takes_off(bench: Bench) -> None:
    bench.submit()
    assert bench.drive().status == "done"
    bench.launcher.job.requeued = True
    assert isinstance(bench.tick().action, Rest)
    assert bench.launcher.job.requeued, "who only shows what is over asks nobody"
    control.follow(bench.controller(), clock=lambda: bench.now)
    assert not bench.launcher.job.requeued
