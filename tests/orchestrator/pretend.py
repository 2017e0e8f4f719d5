"""A launcher that only pretends: jobs are records in memory that a test moves on by hand, over real run directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from model import storage
from model.contract import (
    EVALUATE,
    Attempt,
    Cause,
    Outcome,
    closed_file,
    encode,
    manifest_file,
    outcome_file,
    read_attempt,
)
from orchestrator import code, control
from orchestrator.launchers.base import LaunchError, LaunchState, Observation, Query, UnansweredError
from orchestrator.state import State

HEALTH = {"stall_seconds": 60.0, "notice_seconds": 5.0, "non_finite_steps": 3}
RESOURCES = {"nodes": 1, "processes_per_node": 2, "threads": 1}


def phase(kind: str, steps: int = 4, **inputs: str) -> dict[str, Any]:
    return {
        "kind": kind, "steps": steps, "optim": {"batch_size": 8, "lr": 0.1}, "data": {"path": "images", "workers": 2},
        "resources": dict(RESOURCES), "checkpoints": {"every": 2, "keep_last": 2}, "health": dict(HEALTH), **inputs,
    }  # fmt: skip


def job_spec() -> dict[str, Any]:
    """Three phases of four steps, sealed every second one, and an evaluation."""
    return {
        "name": "demo", "seed": 0, "cluster": "here", "model": {"backbone": {"dim": 64}},
        "phases": {
            "pretrain": phase("pretrain"),
            "gram": phase("gram", init="pretrain@final", gram_teacher="pretrain@2"),
            "text": phase("text", vision_tower="gram@final"),
        },
        "evaluate": {"split": "test", "resources": dict(RESOURCES), "health": dict(HEALTH)},
        "tracking": {"enabled": False},
    }  # fmt: skip


CLUSTER = {"name": "here", "launcher": "local"}


def request(spec: dict[str, Any] | None = None, run: str = "demo", **cluster: Any) -> control.Request:
    return control.Request(run, spec or job_spec(), {**CLUSTER, **cluster}, lambda *recorded: recorded)


def tiny_code(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A stand-in for model/ of one small file, as each run gets a copy."""
    (folder / "tiny").mkdir(exist_ok=True)
    (folder / "tiny" / "train.py").write_text("STEPS = 4\n")
    patch.setattr(code, "installed", lambda: folder / "tiny")


@dataclass
class Job:
    """A launched attempt. `running`: its processes are there; `ended`: it has published its outcome."""

    attempt: Attempt
    visible_at: float = 0.0
    running: bool = True
    ended: bool = False
    asked: list[str] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)
    step: int = 0
    pending: bool = False  # it waits in the queue
    requeued: bool = False  # its second incarnation, or its double, waits in the queue

    def closed(self) -> bool:
        return storage.exists(f"{self.attempt.run_dir}/{closed_file(self.attempt.attempt)}")

    def train(self, updates: int) -> None:
        """Go on by so many updates, sealing as the spec says, as long as the attempt is not closed."""
        if self.attempt.phase == EVALUATE:
            return
        last, every = self.attempt.settings["steps"], self.attempt.settings["checkpoints"]["every"]
        for step in range(self.step + 1, min(self.step + updates, last) + 1):
            self.step = step
            if (step == last or step % every == 0) and not self.closed():
                self.seal(step)

    def seal(self, step: int) -> None:
        where = manifest_file(self.attempt.phase, self.attempt.attempt, step)
        storage.publish(f"{self.attempt.run_dir}/{where}", b"{}")
        self.sealed.append(step)

    def finished(self) -> bool:
        return self.attempt.phase == EVALUATE or self.step == self.attempt.settings["steps"]

    def end(self, cause: Cause, bad_nodes: Sequence[str] = ()) -> None:
        """Publish the outcome; the process lingers for its last act."""
        message = f"it ended: {cause.value}"
        outcome = Outcome(cause=cause, message=message, step=self.step, bad_nodes=list(bad_nodes))
        storage.publish(f"{self.attempt.run_dir}/{outcome_file(self.attempt.attempt)}", encode(outcome))
        self.ended = True


@dataclass
class PretendLauncher:
    """`clock` is read for jobs that show up late; `blind`: it does not answer; `refuses`: it takes nothing; `mute`: it
    takes what is submitted and the answer is lost. `told`: what it adds to the observation of every job; `there`: its
    nodes, by name, of which `down` ones cannot be used."""

    clock: Callable[[], float] = lambda: 0.0
    jobs: list[Job] = field(default_factory=list)
    lag: float = 0.0
    blind: bool = False
    refuses: bool = False
    mute: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    there: tuple[str, ...] | None = None
    down: set[str] = field(default_factory=set)
    questions: int = 0
    on_submit: Callable[[Attempt], None] = lambda attempt: None

    def __call__(self, cluster: Any) -> PretendLauncher:
        return self

    def render(self, attempt: Attempt, digest: str) -> str:
        return attempt.launch_name

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        if self.refuses:
            raise LaunchError("no such partition")
        self.on_submit(attempt)
        path = f"{attempt.run_dir}/attempts/{attempt.attempt}/attempt.yaml"
        assert read_attempt(storage.read(path), path) == attempt
        start = attempt.resume[0].step if attempt.resume else 0
        self.jobs.append(Job(attempt, visible_at=self.clock() + self.lag, step=start))
        if self.mute:
            raise UnansweredError("Socket timed out on send/recv operation")
        return {"job": attempt.launch_name}

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        self.questions += 1
        return [self._observe(query) for query in queries]

    def _observe(self, query: Query) -> Observation:
        if self.blind:
            return Observation(LaunchState.UNKNOWN, detail="connection refused")
        job = self.find(query.launch_name)
        if job is None or self.clock() < job.visible_at:
            return Observation(LaunchState.ABSENT)
        state = LaunchState.ENDED
        if job.running:
            state = LaunchState.PENDING if job.pending else LaunchState.RUNNING
        return Observation(state, {"job": query.launch_name}, **{"detail": "node 1", **self.told})

    def cancel(self, query: Query, *, hard: bool) -> None:
        job = self.find(query.launch_name)
        if job is not None and (job.running or job.requeued) and self.clock() >= job.visible_at:
            job.asked.append("hard" if hard else "soft")
            job.running = job.running and not hard
            job.requeued = job.requeued and not hard

    def clear(self, queries: Sequence[Query]) -> None:
        if self.blind:
            raise LaunchError("no answer")
        for job in self.jobs:
            if job.attempt.launch_name in {query.launch_name for query in queries}:
                job.requeued = False

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        return None if self.there is None else len(set(self.there) - self.down - set(exclude))

    def find(self, launch_name: str) -> Job | None:
        return next((job for job in self.jobs if job.attempt.launch_name == launch_name), None)

    @property
    def job(self) -> Job:
        return self.jobs[-1]


class Bench:
    """A runs folder, a stand-in cluster and a clock that is moved by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.launcher = PretendLauncher(clock=lambda: self.now)

    def dir(self, run: str = "demo") -> str:
        return str(self.folder / run)

    def submit(self, spec: dict[str, Any] | None = None, run: str = "demo", **options: Any) -> control.Submitted:
        return control.submit(self.dir(run), request(spec, run), by="test", **options)

    def controller(self, run: str = "demo") -> control.Controller:
        return control.controller(self.dir(run), self.launcher, command="test", settle_seconds=5.0)

    def tick(self, this: control.Controller | None = None, seconds: float = 1.0) -> control.TickResult:
        self.now += seconds
        return control.tick(this or self.controller(), self.now)

    def drive(self, run: str = "demo", until: str | None = None, ticks: int = 100) -> State:
        """Ticks, with every job trained to its end, until the run rests or stage `until` is under way."""
        this = self.controller(run)
        for _ in range(ticks):
            state = self.tick(this, 10.0).state
            if state.status != "running" or (until and state.live and state.live.phase == until):
                return state
            for job in self.launcher.jobs:
                if job.running and not job.ended:
                    job.train(10)
                    job.end(Cause.DONE)
        raise AssertionError("the run does not come to rest")
