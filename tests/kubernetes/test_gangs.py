"""Stopping attempts, and gangs that are half placed, on a real control plane with fake nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from model.contract import Cause
from orchestrator import control
from orchestrator.events import AttemptEnded
from orchestrator.launchers.base import LaunchState
from tests.kubernetes.fake import (
    ask,
    case,
    launcher,
    look,
    names,
    play,
    pods,
    run,
    wait_until,
)
from tests.model.standin.attempts import wait_for
from tests.orchestrator.pretend import job_spec, tiny_code

if TYPE_CHECKING:
    from tests.kubernetes.cluster import Place

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_an_attempt_that_is_stopped_runs_until_its_pods_have_ended(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes), case(tmp_path / "run")
    handle = run(mine, one)
    for pod in pods(kubernetes, one).values():
        play(kubernetes, pod, drain="4s")
    mine.cancel(ask(one, handle), hard=False)
    seen = wait_until(mine, one, handle, LaunchState.RUNNING, words="is being stopped")
    assert "2 pods have not ended yet" in seen.detail
    mine.cancel(ask(one, handle), hard=False)  # once more is nothing
    wait_until(mine, one, handle, LaunchState.ENDED)
    assert names(kubernetes, "services") == [handle["job"]]  # the pods meet by its names until the end
    mine.clear([ask(one, handle)])
    assert names(kubernetes, "services") == []


def test_a_hard_stop_does_not_wait_for_the_grace(kubernetes: Place, tmp_path: Path) -> None:
    mine, one = launcher(kubernetes, grace_seconds=3600), case(tmp_path / "run")
    handle = run(mine, one)
    for pod in pods(kubernetes, one).values():
        play(kubernetes, pod, **{"ignore-term": ""})
    mine.cancel(ask(one, handle), hard=False)
    mine.cancel(ask(one, handle), hard=True)
    assert look(mine, one, handle).state is LaunchState.ENDED
    wait_for(lambda: not pods(kubernetes, one), 60)  # the Job controller lets go of them in its own time


# --- gangs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["indexed-job", "pod-group"])
def test_two_runs_that_each_hold_what_the_other_lacks(
    kubernetes: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """With the controller's own ticks; its clock runs ahead, so that no wait between two tries is sat out. Of pod
    groups the scheduler never places a half, so none is given back."""
    tiny_code(tmp_path, monkeypatch)
    spec = job_spec()
    spec["phases"] = {"pretrain": spec["phases"]["pretrain"]}
    spec["phases"]["pretrain"]["resources"] |= {"nodes": 20, "processes_per_node": 8}
    profile = {
        "name": "there",
        "launcher": "kubernetes",
        "kubernetes": kubernetes.fake_section(scheduler=scheduler, gang_seconds=4, poll_seconds=0.1),
    }
    runs = {name: str(tmp_path / "runs" / name) for name in ("one", "two")}
    this, clock = {}, control.now()
    for name, folder in runs.items():
        control.submit(folder, control.Request(name, spec, profile, lambda *recorded: recorded), by="test")
        this[name] = control.controller(folder, launcher_of, command="test", settle_seconds=0.0)
    has_had_its_turn: list[str] = []
    for _ in range(600):
        seen = {name: control.tick(this[name], clock).launch for name in runs}
        for name, other in (("one", "two"), ("two", "one")):
            lacked = given_back(runs[other]) if scheduler == "indexed-job" else NO_NODE in seen[other].detail
            is_running = seen[name].state is LaunchState.RUNNING and name not in has_had_its_turn
            if is_running and (lacked or other in has_had_its_turn):
                has_had_its_turn.append(name)
                control.request_stop(runs[name], by="test", hard=True)
        clock += 3.0
        if len(has_had_its_turn) == 2:
            break
    assert sorted(has_had_its_turn) == ["one", "two"]
    ends = [end for name in runs for end in given_back(runs[name])]
    assert bool(ends) == (scheduler == "indexed-job")
    assert all("of 20 pods have a node, the others none: 0/" in end.message for end in ends)
    for name in runs:
        for _ in range(20):
            control.request_stop(runs[name], by="test", hard=True)
            if control.tick(this[name], clock).state.status != "running":
                break
    for kind in ("jobs", "services", "podgroups"):
        assert names(kubernetes, kind) == []


NO_NODE = "none of its 20 pods has a node yet"


def given_back(run: str) -> list[AttemptEnded]:
    """The attempts of a run that had some of their pods, and gave them back."""
    ends = [attempt.end for attempt in control.load(run).attempts if attempt.end]
    return [end for end in ends if end.cause is Cause.UNPLACED]


def launcher_of(cluster: Any) -> Any:
    from orchestrator.launchers import launcher_for

    return launcher_for(cluster)


def test_usable_nodes(kubernetes: Place) -> None:
    mine, resources = launcher(kubernetes), {"processes_per_node": 8}
    assert mine.usable_nodes(resources, []) == 32
    assert mine.usable_nodes(resources, ["gpu-000", "gpu-001"]) == 30
    assert mine.usable_nodes({"processes_per_node": 9}, []) == 0
    assert mine.usable_nodes({**resources, "kubernetes": {"tolerations": []}}, []) == 0
    assert mine.usable_nodes({**resources, "kubernetes": {"together": "topology.kubernetes.io/zone"}}, []) in (
        16,
        32,
        0,
    )
