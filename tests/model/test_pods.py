"""The agent as the first process of a pod: real process tables and torchruns; the ranks are a stand-in."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model import contract, endings, storage
from model.contract import Attempt, Cause
from orchestrator import logs
from tests.model.standin.attempts import make, wait_for
from tests.model.standin.left import nothing_is_left, started
from tests.model.standin.pods import Pods

__all__ = ["nothing_is_left"]

pytestmark = pytest.mark.requires("namespaces")
CODES = contract.EXIT_CODES


def pods(folder: Path, standin: list[str], **changes: Any) -> Pods:
    case = make(folder / "run", standin, code_dir="", **changes)
    return started(Pods(case, folder / "pods", str(folder / "run" / "code" / "standin")))


def test_a_notice_stops_the_first_process_and_what_it_said_stays(tmp_path: Path) -> None:
    pod = pods(tmp_path, ["steps:100000"])
    pod.start()
    wait_for(pod.pulsing)
    pod.agent().send_signal(signal.SIGTERM)
    assert pod.wait() == [CODES[Cause.STOPPED]]
    assert pod.case.outcome.cause is Cause.STOPPED
    assert "stand-in rank 0" in pod.case.log(0)
    for kept in (pod.log(), pod.printed()):
        assert "asked to stop" in kept
        assert f"{pod.name}: stopped: " in kept
    claim = pod.case.claim
    assert (claim.pid, claim.job, claim.host) == (1, "5e8a", f"{pod.name}-0")
    assert pod.case.facts()["PYTHONPATH"] == pod.code, "the image's code is the ranks' too"


def test_orphans_are_reaped(tmp_path: Path) -> None:
    pod = pods(tmp_path, ["orphans"])
    pod.start()
    agent = pod.agent()
    wait_for(lambda: [child for child in agent.children() if child.name() == "sleep"])
    wait_for(lambda: not [child for child in agent.children() if child.name() == "sleep"])
    agent.send_signal(signal.SIGTERM)
    assert pod.wait() == [CODES[Cause.STOPPED]]


def test_nothing_is_left_of_a_pod_that_does_not_seal_in_time(tmp_path: Path) -> None:
    pod = pods(tmp_path, ["children"], notice=0.5)
    pod.start()
    wait_for(pod.pulsing)
    family = pod.agent().children(recursive=True)
    assert len(family) == 2
    pod.agent().send_signal(signal.SIGTERM)
    pod.agent().send_signal(signal.SIGTERM)  # no second request: the Job's end follows the eviction's
    assert pod.wait() == [CODES[Cause.UNSEALED]]
    assert "did not seal within health.notice_seconds" in pod.case.outcome.message
    assert not [process for process in family if process.is_running()]


def test_an_attempt_that_another_has_and_a_pod_that_is_told_too_little(tmp_path: Path) -> None:
    pod = pods(tmp_path, ["steps:3"])
    storage.publish(f"{pod.case.run_dir}/{contract.claim_file(1)}", b"another's")
    pod.start()
    assert pod.wait() == [CODES[Cause.SUPERSEDED]]
    environment = {name: value for name, value in pod.environment(0).items() if name != "DINOCTL_HOST"}
    pod.environment = lambda node: environment  # type: ignore[method-assign]
    (pod.folder / "tmp-0").rmdir()
    pod.start()
    assert pod.wait() == [CODES[Cause.USER_ERROR]]
    assert "lacks DINOCTL_HOST" in pod.printed()


def test_memory_that_ran_out_elsewhere_on_the_machine_is_not_the_pods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of both versions of cgroups; the machine's own count is asked for elsewhere."""
    first, second = tmp_path / "memory.oom_control", tmp_path / "memory.events"
    first.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    monkeypatch.setattr(endings, "OF_CONTAINER", (str(second), str(first)))
    monkeypatch.setattr(endings, "OF_MACHINE", (str(tmp_path / "vmstat"),))
    assert endings.oom_kills() is None
    monkeypatch.setenv("DINOCTL_NODES", "1")
    assert endings.oom_kills() == 2
    second.write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 3\noom_group_kill 0\n")
    assert endings.oom_kills() == 3


@pytest.mark.jobs
def test_two_pods_meet_once_the_first_ones_name_is_known(tmp_path: Path) -> None:
    """A name that the DNS is asked for too early is not known for a while."""
    both = pods(tmp_path, ["steps:100000"] * 2, phase="pretrain", nodes=2, processes_per_node=1)
    both.start(known=False)
    wait_for(lambda: (both.case.run_dir / contract.agent_log(1, 1)).exists() and "node 0 at" in both.log(1), 120)
    assert f"{both.name}-0.{both.name}" in both.log(1)
    both.name_them()
    wait_for(both.pulsing, 300)
    assert [both.case.facts(rank)["MASTER_ADDR"] for rank in (0, 1)] == [f"{both.name}-0.{both.name}"] * 2
    both.agent(1).send_signal(signal.SIGTERM)  # one pod alone is evicted
    assert both.wait() == [CODES[Cause.STOPPED]] * 2
    assert (both.case.outcome.cause, both.case.outcome.bad_nodes) == (Cause.STOPPED, [])
    assert f"{both.name}, gpu1: stopped" in both.log(1)
    assert both.case.claim.address == f"{both.name}-0.{both.name}"


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_in_a_bucket_a_pods_logs_outlive_it(tmp_path: Path, s3: str) -> None:
    """The ranks', and the agent's with what torchrun prints itself."""
    run_dir = f"{s3}/run"
    pod = pods(tmp_path, ["bare:7"], phase="pretrain", watch_seconds=1.0)
    attempt: Attempt = msgspec.structs.replace(pod.case.attempt, run_dir=run_dir)
    pod.yaml = f"{run_dir}/{contract.attempt_yaml(1)}"
    storage.publish(pod.yaml, msgspec.yaml.encode(attempt))
    pod.start()
    assert pod.wait() == [CODES[Cause.CRASHED]]
    assert "stand-in rank 0" in logs.read(f"{run_dir}/{contract.rank_log(1, 0)}").decode()
    said = logs.read(f"{run_dir}/{contract.agent_log(1)}").decode()
    assert "1 ranks, pid" in said
    assert "torch/distributed" in said
    assert f"{pod.name}: crashed: " in said
