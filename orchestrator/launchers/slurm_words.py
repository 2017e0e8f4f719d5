"""Slurm's words for the states of jobs, and what they mean for an attempt. Pure."""

from __future__ import annotations

import re
import time
from typing import Any

from model.contract import CAUSES, Cause, hosts
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.launchers.slurm_queue import Job

PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")

NOTES = {
    "COMPLETING": "is being ended",
    "SUSPENDED": "is suspended by the site, and goes on when the site lets it",
    "STOPPED": "is stopped by the site, and goes on when the site lets it",
    "CONFIGURING": "waits for its nodes to boot",
}

CAUSES_OF_STATES = {
    "NODE_FAIL": Cause.VANISHED,
    "BOOT_FAIL": Cause.VANISHED,
    "LAUNCH_FAILED": Cause.VANISHED,
    "CANCELLED": Cause.VANISHED,
    "PREEMPTED": Cause.VANISHED,
    "REVOKED": Cause.VANISHED,
    "DEADLINE": Cause.VANISHED,
    "TIMEOUT": Cause.UNSEALED,
    "OUT_OF_MEMORY": Cause.KILLED,
}
"""What an end without an outcome means. COMPLETED says nothing, FAILED only by a code of the contract."""

REASONS = {
    "Priority": "others are before it",
    "Resources": "it is next, and waits for nodes to become free",
    "Dependency": "it waits for another job",
    "JobHeldUser": "it is held: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "BeginTime": "its time to begin has not come",
    "Reservation": "its reservation has not begun",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives; it will not start as it is",
    "PartitionTimeLimit": "it asks for more time than the partition gives; it will not start as it is",
    "PartitionConfig": "it asks for more than the partition has; it will not start as it is",
    "BadConstraints": "no nodes are as its constraint says; it will not start as it is",
    "NodeDown": "a node that it needs is down",
    "Licenses": "it waits for a licence",
    "Cleaning": "it was requeued, and its first run is still being ended",
}


def state(word: str) -> LaunchState:
    """A word that no Slurm of today has is UNKNOWN: nothing is decided from it."""
    if word in PENDING:
        return LaunchState.PENDING
    if word in RUNNING:
        return LaunchState.RUNNING
    return LaunchState.ENDED if word in ENDED else LaunchState.UNKNOWN


ENDED = ("COMPLETED", "FAILED", *CAUSES_OF_STATES)


def observation(job: Job, handle: dict[str, Any]) -> Observation:
    """What the queue or the accounts tell of a job, for a controller and for a person."""
    seen, nodes = state(job.state), tuple(hosts(job.nodes))
    if seen is LaunchState.PENDING:
        return Observation(seen, handle, _waiting(job), nodes=nodes, starts_at=job.starts_at)
    if seen is LaunchState.RUNNING:
        where = f" on {job.nodes}" if job.nodes else ""
        return Observation(seen, handle, f"job {job.id}{where}{_note(job)}", nodes=nodes)
    if seen is LaunchState.UNKNOWN:
        return Observation(seen, handle, f"job {job.id} is in a state new to dinoctl: {job.state}", nodes=nodes)
    return Observation(seen, handle, _end(job), cause=cause(job), nodes=nodes)


def cause(job: Job) -> Cause | None:
    """What the end means if the agent left no word of its own; None: Slurm's word says nothing of it."""
    if job.state == "FAILED" and job.exit_code:
        return CAUSES.get(job.exit_code)
    return CAUSES_OF_STATES.get(job.state)


def _waiting(job: Job) -> str:
    reason = job.reason.strip("()").split(",")[0]
    words = REASONS.get(reason, "")
    why = f"{words} ({reason})" if words else reason.replace("None", "") or "it was just submitted"
    partition = f" in {job.partition}" if job.partition else ""
    start = ""
    if job.starts_at:
        start = f"; expected to start {time.strftime('%d %b %H:%M', time.localtime(job.starts_at))}"
    return f"job {job.id} waits{partition}{_note(job)}: {why}{start}"


def _note(job: Job) -> str:
    return f", {NOTES[job.state]}" if job.state in NOTES else ""


def _end(job: Job) -> str:
    code = f", exit code {job.exit_code}" if job.exit_code else ""
    where = f" on {job.nodes}" if hosts(job.nodes) else ""
    return f"job {job.id}{where} ended as {job.state}{code}"


def is_over(words: str) -> bool:
    """Whether scancel refused only because there is nothing left to cancel."""
    return re.search("invalid job id|already complet|job/step already|has no active", words.lower()) is not None


ADVICE = {
    "partition": "set slurm.partition; `sinfo -s` lists those that are there",
    "account": "set slurm.account; `sacctmgr show associations user=$USER` lists those you may use",
    "qos": "set slurm.qos; `sacctmgr show associations user=$USER format=account,qos` lists those you may use",
    "time limit": "lower resources.time_limit_minutes, or use a partition that gives more; see `sinfo -o '%P %l'`",
    "feature": "slurm.constraint names a feature that no node has; `sinfo -o '%N %f'` lists them",
    "reservation": "slurm.reservation is not there, or not for you; `scontrol show reservation` lists them",
    "node name": "slurm.exclude names a node that the cluster does not have",
    "node count": "lower resources.nodes, or use a larger partition",
    "node configuration": "no node has what is asked for: see resources.processes_per_node, slurm.cpus_per_task, "
    "slurm.gpus and slurm.extra against `scontrol show node`",
    "processors": "lower slurm.cpus_per_task; `sinfo -o '%N %c'` shows what nodes have",
    "gres": "the partition has no GPUs of that kind; slurm.gpus: false asks for none",
    "accounting/qos policy": "a limit of your account or QOS is reached: fewer nodes, less time, or wait",
    "unable to contact": "the cluster's controller is down or cannot be reached from here",
    "not on this machine": "submit from a login node of the cluster, or use --cluster local",
}


def advice(words: str) -> str:
    """What to do about a refusal of sbatch; empty where its own words are all there is."""
    said = words.lower()
    order = ("accounting/qos policy", "node name", "account", *ADVICE)
    return next((ADVICE[key] for key in order if key in said), "")
