"""Logs of a run, event by event, for tests of the fold and of the decision: no files, no clock."""

from __future__ import annotations

from typing import Any

from model.contract import EVALUATE, Cause, CheckpointRef
from orchestrator import events as ev
from orchestrator.decide import Seen
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.state import State, fold
from tests.orchestrator.pretend import CLUSTER, job_spec

RUN_ID = "0123456789abcdef" * 2


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
