"""Whatever happens, in whatever order: no phase runs twice at once, none is skipped, no sealed step is lost.

Two real controllers on a real log. The cluster is a stand-in; controllers die before or after any file that they
publish and any call of the launcher, act between two steps of each other, lose sight of the cluster, and see jobs late.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model import storage
from model.contract import EVALUATE, Attempt, Cause
from orchestrator import control, store
from orchestrator.control import Controller
from orchestrator.state import fold
from tests.orchestrator.pretend import Job, PretendLauncher, job_spec, request, tiny_code

SETTLE = 5.0
SPEC = job_spec()
for settings_of_a_phase in SPEC["phases"].values():
    settings_of_a_phase["checkpoints"]["every"] = 1
STAGES = [*SPEC["phases"], EVALUATE]
ENDS = [Cause.STOPPED, Cause.CRASHED, Cause.KILLED, Cause.HUNG, Cause.SUPERSEDED, Cause.DISK_FULL]
TOLD: list[dict[str, Any]] = [
    {}, {"cause": Cause.VANISHED, "bad_nodes": ("node1",)}, {"bad_nodes": ("node2", "node1")},
    {"cause": Cause.KILLED}, {"cause": Cause.UNSEALED}, {"cause": Cause.DONE},
]  # fmt: skip
"""What a cluster may say of an end, or of a job that still runs."""
WHICH = st.integers(0, 1)
POINTS = st.integers(0, 9)
PAUSES = st.sampled_from([0.0, 1.0, 6.0, 61.0])


class Died(BaseException):
    """A controller was killed."""


class RunMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        tiny_code(self.folder, self.patch)
        self.patch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here, and it is most of the time
        self.run = str(self.folder / "demo")
        self.now = 1000.0
        self.dead: set[str] = set()
        self.launcher = PretendLauncher(clock=lambda: self.now, on_submit=self.check_launch)
        self.patch.setattr(control, "_owner_gone", lambda owner: owner in self.dead)
        self.patch.setattr(control, "now", lambda: self.now)
        self.controllers = [self.controller(), self.controller()]
        control.submit(self.run, request(SPEC), by="test")

    def teardown(self) -> None:
        try:
            self.can_be_finished()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    def controller(self) -> Controller:
        return control.controller(self.run, self.launcher, command="test", settle_seconds=SETTLE)

    @property
    def training(self) -> list[Job]:
        """Jobs whose ranks are there: an agent that has published its outcome has none left."""
        return [job for job in self.launcher.jobs if job.running and not job.ended]

    # --- what controllers do, and how they die (few rules with many cases, so that hypothesis leaves none out for long)

    @rule(which=WHICH, seconds=PAUSES)
    def tick(self, which: int, seconds: float) -> None:
        self.now += seconds
        control.tick(self.controllers[which], self.now)

    @rule(which=WHICH, point=POINTS, seconds=PAUSES)
    def tick_and_die(self, which: int, point: int, seconds: float) -> None:
        def die() -> None:
            raise Died

        self.now += seconds
        try:
            self.tick_with(which, point, die)
        except Died:
            self.dead.add(self.controllers[which].owner)
            self.controllers[which] = self.controller()

    @rule(which=WHICH, point=POINTS, seconds=PAUSES)
    def tick_within_a_tick(self, which: int, point: int, seconds: float) -> None:
        def other() -> None:
            self.now += seconds
            control.tick(self.controllers[1 - which], self.now)

        self.tick_with(which, point, other)

    def tick_with(self, which: int, point: int, happens: Callable[[], None]) -> None:
        """A tick in which `happens` comes before or after one of the steps that others can see."""
        moments = itertools.count()

        def around(step: Callable[..., Any]) -> Callable[..., Any]:
            def stepped(*args: Any, **kwargs: Any) -> Any:
                if next(moments) == point:
                    happens()
                result = step(*args, **kwargs)
                if next(moments) == point:
                    happens()
                return result

            return stepped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "publish", around(storage.publish))
            patch.setattr(self.launcher, "submit", around(self.launcher.submit))
            patch.setattr(self.launcher, "cancel", around(self.launcher.cancel))
            patch.setattr(self.launcher, "clear", around(self.launcher.clear))
            control.tick(self.controllers[which], self.now)

    # --- what the world does

    @precondition(lambda self: self.training)
    @rule(updates=st.integers(1, 3))
    def a_job_trains(self, updates: int) -> None:
        self.training[0].train(updates)

    @precondition(lambda self: self.training)
    @rule(what=st.sampled_from([*ENDS, None]), requeued=st.booleans(), told=st.sampled_from(TOLD))
    def a_job_ends(self, what: Cause | None, requeued: bool, told: dict[str, Any]) -> None:
        """With an outcome, or killed without a word, of which the cluster may tell more; the site may requeue it."""
        job = self.training[0]
        self.launcher.told = told
        if what is None:
            job.running = False
        else:
            job.end(Cause.DONE if job.finished() else what, told.get("bad_nodes", ()))
        job.requeued = requeued

    @rule(what=st.sampled_from(["fine", "fine", "fine", "late", "later", "blind", "refuses", "mute"]))
    def the_cluster(self, what: str) -> None:
        """Takes jobs and shows them, shows them late, does not answer, takes none, or takes them and does not say."""
        self.launcher.blind, self.launcher.refuses = what == "blind", what == "refuses"
        self.launcher.mute = what == "mute"
        self.launcher.lag = {"late": 1.0, "later": SETTLE - 0.5}.get(what, 0.0)

    @precondition(lambda self: self.training or control.load(self.run).status != "running")
    @rule(what=st.sampled_from(["stop", "stop now", "cancel"]))
    def a_user(self, what: str) -> None:
        """Goes on with a run that rests, and asks a running one to stop."""
        if control.load(self.run).status != "running":
            control.submit(self.run, request(SPEC), by="test")
        elif what == "cancel":
            control.cancel(self.run, by="test")
        else:
            control.request_stop(self.run, by="test", hard=what == "stop now")

    # --- what must hold

    def check_launch(self, attempt: Attempt) -> None:
        """Called by the stand-in for each job that it takes."""
        log = control.load(self.run)
        assert not self.training, "a second job beside one that trains"
        assert self.launcher.find(attempt.launch_name) is None, "launched twice"
        over = [stage.name for stage in log.stages if log.is_over(stage)]
        assert attempt.phase == STAGES[len(over)], "a stage was skipped or repeated"
        sealed = [step for job in self.launcher.jobs if job.attempt.phase == attempt.phase for step in job.sealed]
        newest = attempt.resume[0].step if attempt.resume else 0
        assert newest == max(sealed, default=0), "a sealed step was lost"
        lost = {node for ended in log.attempts if ended.end for node in ended.end.bad_nodes}
        assert set(attempt.exclude) == lost, "nodes are left out for a day, which no test lasts"

    @invariant()
    def at_most_one_job_trains(self) -> None:
        assert len(self.training) <= 1

    @invariant()
    def what_counts_is_what_was_sealed(self) -> None:
        for attempt in control.load(self.run).attempts:
            job = self.launcher.find(attempt.intent.launch_name)
            if attempt.end is not None:
                assert attempt.end.steps == (job.sealed if job else [])

    @invariant()
    def a_job_is_asked_to_stop_once(self) -> None:
        assert all(job.asked.count("soft") <= 1 for job in self.launcher.jobs)

    def can_be_finished(self) -> None:
        """From wherever it stands: with the world in order, the run ends done, each stage once and in order."""
        self.launcher.blind = self.launcher.refuses = self.launcher.mute = False
        self.launcher.lag = 0.0
        for _ in range(200):
            state = control.submit(self.run, request(SPEC), by="test").state
            if state.status == "done":
                break
            for job in self.training[:1]:
                job.train(10)
                job.end(Cause.DONE)
            control.tick(self.controllers[0], self.now)
            self.now += 61.0 + SETTLE
        log = store.read(self.run)
        state = fold(log)
        assert state is not None
        assert state.status == "done"
        order = [STAGES.index(attempt.phase) for attempt in state.attempts]
        assert all(before <= after for before, after in itertools.pairwise(order))
        assert set(order) == set(range(len(STAGES)))


RunMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRun = RunMachine.TestCase
