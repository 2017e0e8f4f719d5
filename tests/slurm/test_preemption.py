"""Whatever a site does to a job that trains on two nodes: its ranks seal, its attempt ends once, nobody restarts it.

The launcher, submitit, Slurm, the agents and torchrun are real; the trainer is a stand-in (tests/model/standin).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from model import contract
from model.contract import Cause
from orchestrator.launchers.base import LaunchState, Observation, Query
from orchestrator.launchers.slurm import SlurmLauncher
from tests.model.standin.attempts import Case, make, wait_for
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.jobs]

PATIENCE = 120.0
PROFILE = {"launcher": "slurm", "slurm": {"partition": "low", "gpus": False, "notice_seconds": 20, "poll_seconds": 0.2}}


@dataclass(frozen=True)
class Sent:
    """An attempt on the cluster."""

    slurm: Cluster
    launcher: SlurmLauncher
    case: Case
    handle: dict[str, Any]

    @property
    def job(self) -> str:
        return str(self.handle["job"])

    def observe(self) -> Observation:
        attempt = self.case.attempt
        query = Query(
            attempt.run_dir, attempt.run_id, attempt.attempt, attempt.launch_name, self.case.digest, self.handle
        )
        return self.launcher.observe([query])[0]

    def show(self, what: str) -> str:
        """A field of squeue's for the job, which squeue knows for minutes after its end."""
        return self.slurm.run("squeue", "-h", "--states=all", f"--jobs={self.job}", "-o", what).strip()

    def stopped(self) -> bool:
        """Whether its outcome is there and says that it sealed, as all its ranks do."""
        path = self.case.run_dir / contract.outcome_file(1)
        ranks = self.case.attempt.nodes * self.case.attempt.processes_per_node
        return path.exists() and self.case.outcome.cause is Cause.STOPPED and all(map(self.sealed, range(ranks)))

    def sealed(self, rank: int) -> bool:
        path = self.case.run_dir / contract.rank_file(1, rank)
        end = contract.decode(path.read_bytes(), contract.RankEnd, str(path))
        return (end.cause, end.message) == (Cause.STOPPED, "sealed")


def send(slurm: Cluster, folder: Path, standin: str, *, nodes: int = 2, **settings: Any) -> Sent:
    """An attempt that trains on every one of its nodes by now."""
    health = {"stall_seconds": 60.0, "notice_seconds": 60.0, "non_finite_steps": 3}
    phase = "pretrain" if nodes > 1 else contract.EVALUATE
    settings = {"health": health, "standin": [standin], **settings}
    made = make(folder, [standin], phase=phase, nodes=nodes, settings=settings)
    launcher = SlurmLauncher(PROFILE)
    sent = Sent(slurm, launcher, made, launcher.submit(made.attempt, made.digest))
    disks = [slurm.node_tmp(name) for name in slurm.settings.node_names]
    scratch = Path(f"dinoctl-{os.getuid()}") / made.attempt.launch_name
    wait_for(lambda: sum(1 for disk in disks for _ in (disk / scratch).glob("pulse-*")) == nodes, PATIENCE)
    return sent


def preempt(slurm: Cluster, seconds: int = 300) -> str:
    """A job of partition high that wants both nodes: its id."""
    sleep = f"--wrap=exec sleep {seconds}"
    return slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", sleep
    ).strip()


def runs(slurm: Cluster, job: str) -> bool:
    return slurm.run("squeue", "-h", f"--jobs={job}", "-o", "%T").strip() == "RUNNING"


NO_GRACE = {"grace": 0, "kill_wait": 60}  # TERM at once, KILL a minute later

SITES = {
    # A preempted job gets the signal that it named, and TERM only when its grace is over.
    "its own signal": {"preempt_mode": "REQUEUE", "grace": 60},
    "its own signal and TERM at once": {"preempt_mode": "CANCEL", **NO_GRACE},
    "TERM alone": {"preempt_mode": "CANCEL", "grace": 60, "send_user_signal": False},
    "TERM alone, twice at once": {"preempt_mode": "REQUEUE", **NO_GRACE, "send_user_signal": False},
    # All processes of a step get the signals above; here only the agents do, as under proctrack/cgroup.
    "to the agent alone": {"preempt_mode": "REQUEUE", "grace": 60, "proctrack": "pgid"},
    "to the agent alone, and TERM at once": {"preempt_mode": "CANCEL", **NO_GRACE, "proctrack": "pgid"},
}


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_a_preempted_attempt_seals_on_every_node_and_stays_away(
    slurm: Cluster, tmp_path: Path, site: dict[str, Any]
) -> None:
    slurm.configure(**site)
    sent = send(slurm, tmp_path, "steps:100000")
    high = preempt(slurm)
    wait_for(sent.stopped, PATIENCE)
    wait_for(lambda: runs(slurm, high), PATIENCE)
    seen = wait_for(lambda: seen if (seen := sent.observe()).state is LaunchState.ENDED else None, PATIENCE)
    assert not seen.bad_nodes
    assert sent.show("%T") in ("FAILED", "PREEMPTED")  # not pending: Slurm does not start it again
    wait_for(lambda: not sent.case.processes(), PATIENCE)


def test_what_does_not_seal_in_time_is_ended_and_nodes_are_not_blamed(slurm: Cluster, tmp_path: Path) -> None:
    slurm.configure(grace=0, kill_wait=2)
    sent = send(slurm, tmp_path, "deaf")
    high = preempt(slurm)
    wait_for(lambda: runs(slurm, high), PATIENCE)
    seen = wait_for(lambda: seen if (seen := sent.observe()).state is LaunchState.ENDED else None, PATIENCE)
    assert (seen.cause, seen.bad_nodes) == (Cause.VANISHED, ())
    assert not (tmp_path / contract.outcome_file(1)).exists()
    wait_for(lambda: not sent.case.processes(), PATIENCE)


def test_the_time_limit_is_announced(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm looks every half a minute, and so the notice comes up to that much early."""
    resources = {"time_limit_minutes": 1, "slurm": {"notice_seconds": 1}}
    sent = send(slurm, tmp_path, "steps:100000", nodes=1, resources=resources)
    wait_for(sent.stopped, PATIENCE)
    assert "asked to stop" in (tmp_path / contract.agent_log(1)).read_text()
    wait_for(lambda: sent.show("%T") == "FAILED", PATIENCE)  # not TIMEOUT: it was gone before


def test_a_suspended_attempt_runs_and_is_not_hung_afterwards(slurm: Cluster, tmp_path: Path) -> None:
    sent = send(
        slurm,
        tmp_path,
        "steps:100000",
        nodes=1,
        health={"stall_seconds": 8.0, "notice_seconds": 60.0, "non_finite_steps": 3},
    )
    slurm.run("scontrol", "suspend", sent.job)
    wait_for(lambda: sent.show("%T") == "SUSPENDED", PATIENCE)
    seen = sent.observe()
    assert seen.state is LaunchState.RUNNING
    assert "suspended" in seen.detail
    time.sleep(12)  # longer than an attempt may go without a step
    slurm.run("scontrol", "resume", sent.job)
    time.sleep(2)
    assert not (tmp_path / contract.outcome_file(1)).exists()
    slurm.run("scancel", "--signal=USR2", sent.job)
    wait_for(sent.stopped, PATIENCE)


@pytest.mark.parametrize("by", ["scontrol", "preemption"])
def test_a_job_that_the_site_requeues_trains_once(slurm: Cluster, tmp_path: Path, by: str) -> None:
    sent = send(slurm, tmp_path, "steps:100000")
    slurm.run("scontrol", "update", f"jobid={sent.job}", "requeue=1")  # as a submit plugin of the site might
    if by == "preemption":
        slurm.configure(**NO_GRACE)
        preempt(slurm, seconds=1)
    else:
        slurm.run("scontrol", "requeue", sent.job)
    wait_for(sent.stopped, PATIENCE)
    assert sent.case.claim.job == f"{sent.job}.0"

    def restarted() -> bool:
        return "Restarts=1" in slurm.run("scontrol", "show", "job", sent.job)

    wait_for(restarted, PATIENCE)
    assert sent.observe().state is LaunchState.ENDED
    wait_for(lambda: sent.show("%T") == "FAILED", PATIENCE)  # its agents found the claim taken
    said = [(tmp_path / contract.agent_log(1, node)).read_text() for node in range(2)]
    assert any("superseded, nothing was started" in text for text in said)  # once one has left, srun ends the other
    assert [text.count(" ranks, pid ") for text in said] == [1, 1]
    assert sent.stopped()
