"""Small jobs of dinoctl's own on a Slurm cluster: one core, no GPU, a few minutes or as long as the run.

    <launch name>-end          after each attempt, however it ended: `dinoctl tick`. It depends on the attempt's job
                               (afterany), so that a run goes on after SIGKILL or a lost node with no process of
                               ours alive
    <run>-<8 hex>-controller   `controller: {on: cluster}`: orchestrator.controller_job, until the run is over. One
                               waits behind it (singleton) and begins when it ends, whatever ended it: time limit,
                               preemption, a lost node

A doubled one of either is harmless, as any process may tick. None is an attempt: it trains nothing and has no claim.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model import contract, storage
from model.contract import Attempt
from orchestrator.asking_slurm import NoAnswerError, ask
from orchestrator.attempts import NAME_LENGTH

END, CONTROLLER = "end", "controller"

END_MINUTES = 30
"""A tick that closes an attempt waits for the scheduler twice and for a pause before the next try."""

MEMORY = "2G"
"""Of a small job. Without it many sites give a job all of a node's memory."""


@dataclass(frozen=True)
class Small:
    """A small job as it is sent: options of sbatch, and the script on its standard input."""

    name: str
    options: tuple[str, ...]
    script: str

    def __str__(self) -> str:
        return f"{shlex.join(['sbatch', '--parsable', *self.options])} <<'EOF'\n{self.script}EOF\n"


@dataclass(frozen=True)
class Queued:
    job: str
    name: str
    state: str  # PENDING, RUNNING ...
    comment: str


# --- after an attempt -------------------------------------------------------------------------------------------------


def cover_end(attempt: Attempt, slurm: Mapping[str, Any], job: str) -> dict[str, Any]:
    """Have the attempt's end taken in, whatever it is; to be called once its job is there.

    slurm: the `slurm` section that the attempt was sent with; job: the job that Slurm gave it. Returns what belongs
    into the attempt's handle: `end_job`, or `end_job_refused` with the reason, as the attempt itself runs all the same.
    Those of earlier attempts that still wait are cancelled: their attempts are over.
    """
    if not slurm.get("end_job", True):
        return {}
    try:
        _cancel_earlier(attempt)
        return {"end_job": submit(end_job(attempt, slurm, job))}
    except NoAnswerError as error:
        return {"end_job_refused": str(error)}


def end_job(attempt: Attempt, slurm: Mapping[str, Any], job: str) -> Small:
    """The job that ticks when `job` is over. Pure."""
    options = (
        f"--dependency=afterany:{job}", "--kill-on-invalid-dep=yes", f"--comment={attempt.run_id}:{END}",
        f"--time={END_MINUTES}", "--requeue",
    )  # fmt: skip
    command = [*_python(slurm), "-P", "-m", "orchestrator.cli", "tick", attempt.run_dir]
    return _small(end_name(attempt.launch_name), attempt.run_dir, slurm, options, command)


def end_name(launch_name: str) -> str:
    """`<launch name>-end`. Where that is too long it is cut in front: what tells launch names apart stands behind."""
    return f"{launch_name[-(NAME_LENGTH - len(END) - 1) :].lstrip('-')}-{END}"


def _cancel_earlier(attempt: Attempt) -> None:
    """Only those that wait: one that runs may be who calls."""
    mine = [job for job in queued(attempt.run_id, END) if job.state == "PENDING"]
    if mine:
        ask("scancel", "--state=PENDING", *(job.job for job in mine))


# --- a controller of its own ------------------------------------------------------------------------------------------


def start_controller(
    run_dir: str, run: str, run_id: str, slurm: Mapping[str, Any], minutes: int | None
) -> tuple[Queued, bool]:
    """See to it that a controller's job is there, beside the one that this process may be; the job, and whether it is
    new. minutes: its time limit; None: the partition's. Raises NoAnswerError."""
    name, here = controller_name(run, run_id), os.environ.get("SLURM_JOB_ID")
    others = [job for job in queued(run_id, CONTROLLER) if job.job != here]
    if others:
        return others[0], False
    job = submit(controller_job(run_dir, name, run_id, slurm, minutes))
    return Queued(job, name, "PENDING", f"{run_id}:{CONTROLLER}"), True


def controller_job(run_dir: str, name: str, run_id: str, slurm: Mapping[str, Any], minutes: int | None) -> Small:
    """Pure. `exec`, so that a signal to the batch script reaches the controller itself."""
    options = (
        "--dependency=singleton", f"--comment={run_id}:{CONTROLLER}", "--requeue", "--signal=B:TERM@30",
        *([] if minutes is None else [f"--time={minutes}"]),
    )  # fmt: skip
    command = [*_python(slurm), "-P", "-m", "orchestrator.controller_job", run_dir]
    return _small(name, run_dir, slurm, options, command)


def controller_name(run: str, run_id: str) -> str:
    return f"{run}-{run_id[:8]}-{CONTROLLER}"


def cancel_controllers(run_id: str) -> None:
    """End the controllers' jobs of a run, all but the one that this process is. Raises NoAnswerError."""
    here = os.environ.get("SLURM_JOB_ID")
    others = [job.job for job in queued(run_id, CONTROLLER) if job.job != here]
    if others:
        ask("scancel", *others)


# --- both -------------------------------------------------------------------------------------------------------------


def queued(run_id: str, kind: str) -> list[Queued]:
    """The small jobs of a run that wait or run, oldest first. Raises NoAnswerError."""
    text = ask("squeue", "-h", "--me", "-S", "i", "-o", "%i|%T|%j|%k")
    rows = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return [
        Queued(job, name, state, comment)
        for job, state, name, comment in rows
        if comment == f"{run_id}:{kind}" and state != "COMPLETING"
    ]


def submit(small: Small) -> str:
    """Hand it to sbatch; the job's id. Raises NoAnswerError."""
    return ask("sbatch", "--parsable", *small.options, given=small.script).strip().split(";")[0]


def placement(slurm: Mapping[str, Any]) -> list[str]:
    """Where a small job may run: on `control_partition` if there is one, else wherever attempts may."""
    names = ("account",) if slurm.get("control_partition") else ("account", "qos", "constraint", "reservation")
    partition = slurm.get("control_partition") or slurm.get("partition")
    chosen = [f"--partition={partition}"] if partition else []
    return [*chosen, *(f"--{name}={slurm[name]}" for name in names if slurm.get(name))]


def _small(name: str, run_dir: str, slurm: Mapping[str, Any], options: Sequence[str], command: Sequence[str]) -> Small:
    log = _log(run_dir, name)
    every = (
        f"--job-name={name}", *placement(slurm), "--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--mem={MEMORY}",
        f"--output={log.replace('%', '%%')}", "--open-mode=append",
        *([] if storage.is_uri(run_dir) else [f"--chdir={run_dir}"]),
    )  # fmt: skip
    script = "\n".join(["#!/bin/bash", *slurm.get("setup", []), f"exec {shlex.join(command)}", ""])
    return Small(name, (*every, *options), script)


def _python(slurm: Mapping[str, Any]) -> list[str]:
    return shlex.split(slurm["python"]) if slurm.get("python") else [sys.executable]


def _log(run_dir: str, name: str) -> str:
    """Where it writes: `watch.log` of the run, or for a run in a bucket a file in the cache, which nodes see too."""
    if not storage.is_uri(run_dir):
        return f"{run_dir}/watch.log"
    folder = contract.cache_dir() / "slurm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder / f"{name}.log")
