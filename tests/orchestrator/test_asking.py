"""What `status RUN` gets to know of a cluster: asked once, and not waited for."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from model.contract import Cause
from orchestrator import asking, events, launchers, render, status
from orchestrator.launchers.base import LaunchError, LaunchState, Observation, Query
from tests.orchestrator.written import Run

NOW = 1005.0


class Answers:
    """A stand-in launcher that gives one answer, once `late` is set."""

    def __init__(self, answer: Observation, late: threading.Event | None = None) -> None:
        self.answer, self.late, self.asked = answer, late, list[Query]()

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        self.asked += queries
        if self.late is not None:
            self.late.wait(60.0)
        return [self.answer for _ in queries]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "tiny", launcher="slurm")
    run.launch(1, "pretrain")
    return run


def shown(run: Run, patch: pytest.MonkeyPatch, answers: Any) -> str:
    patch.setattr(launchers, "launcher_for", lambda cluster: answers)
    out = io.StringIO()
    Console(file=out, width=200).print(render.detail(status.detail(run.path, NOW, asking.launch_view), NOW))
    return out.getvalue()


def test_the_queues_reason_and_when_it_is_expected_to_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(Observation(LaunchState.PENDING, detail="Priority", starts_at=NOW + 720))
    assert "attempt 1: in the queue: Priority; expected to start in 12 min" in shown(run, monkeypatch, answers)
    assert len(answers.asked) == 1


def test_the_nodes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(Observation(LaunchState.RUNNING, nodes=("node3", "node4")))
    assert "attempt 1: on node3, node4" in shown(run, monkeypatch, answers)


def test_a_cluster_that_does_not_answer_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.05)
    late = threading.Event()
    try:
        text = shown(run, monkeypatch, Answers(Observation(LaunchState.RUNNING), late))
    finally:
        late.set()
    assert "attempt 1: its launcher does not answer: not within 0 s" in text


def test_a_launcher_that_is_not_there_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(cluster: Any) -> Any:
        raise LaunchError("no squeue on this machine")

    monkeypatch.setattr(launchers, "launcher_for", none)
    view = status.detail(run.path, NOW, asking.launch_view)
    assert view.launch == status.LaunchView(
        state="unknown", detail="no squeue on this machine", nodes=[], starts_at=None
    )  # fmt: skip


def test_nobody_is_asked_about_this_machine_nor_without_an_attempt(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Run(tmp_path / "here")
    here.launch(1, "pretrain")
    run.end(1, Cause.STOPPED, [])
    monkeypatch.setattr(launchers, "launcher_for", lambda cluster: pytest.fail("asked"))
    for path in (here.path, run.path):
        assert status.detail(path, NOW, asking.launch_view).launch is None
    status.summaries(str(tmp_path), NOW)


def test_nodes_that_are_left_out_and_an_attempt_on_fewer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    end = {"cause": Cause.VANISHED, "message": "NODE_FAIL", "steps": [], "reached": None}
    run.add(events.AttemptEnded, attempt=1, bad_nodes=["node2"], **end)
    run.launch(2, "pretrain", nodes=3)
    answers = Answers(Observation(LaunchState.PENDING, detail="ReqNodeNotAvail"))
    text = shown(run, monkeypatch, answers)
    assert "left out, as they failed this run: node2 (for 23 h 59 min yet)" in text
    assert "it waits for other nodes; if too few are left: runbooks/vanished.md" in text
    view = status.detail(run.path, NOW)
    assert (view.excluded, view.attempts[1].nodes) == ({"node2": 1000.0 + 24 * 3600}, 3)
