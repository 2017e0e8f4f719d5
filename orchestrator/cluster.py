"""Cluster profiles: where attempts run and how they are sent there. One YAML file each, named by a job's `cluster`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from model.config import Positive, Section
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.problems import Problem, SpecError, did_you_mean, listed
from orchestrator.validation import validate
from orchestrator.yaml_reader import read_yaml

ALREADY_SAID = {
    "account": "slurm.account",
    "constraint": "slurm.constraint",
    "cpus-per-task": "slurm.cpus_per_task",
    "exclude": "slurm.exclude",
    "gpus-per-node": "resources.processes_per_node and slurm.gpus",
    "nodes": "resources.nodes",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "reservation": "slurm.reservation",
    "signal": "slurm.signal and slurm.notice_seconds",
    "time": "resources.time_limit_minutes",
}
"""Options of sbatch that have a field of their own."""

NEVER_SAID = {
    "array": "an attempt is one job",
    "chdir": "it is the attempt's own folder",
    "comment": "a job is known again by it",
    "error": "the logs lie in the run directory",
    "job-name": "a job is looked up by it",
    "no-requeue": "dinoctl alone restarts, and says so already",
    "ntasks": "there is one task a node, the agent",
    "ntasks-per-node": "there is one task a node, the agent",
    "open-mode": "the logs are appended to",
    "output": "the logs lie in the run directory",
    "parsable": "the answer of sbatch is read",
    "requeue": "dinoctl alone restarts, from the last checkpoint",
    "wait": "dinoctl does not wait in sbatch",
    "wrap": "the script is dinoctl's",
}
"""Options of sbatch that dinoctl depends on, and what for."""


class Slurm(Section):
    """What sbatch is told. A job overrides any of it under `resources.slurm`, for all phases or for one."""

    partition: str | None = None
    control_partition: str | None = Field(
        None, description="where dinoctl's own one-core jobs run (a controller, a tick after an end); null: as attempts"
    )
    end_job: bool = Field(True, description="a one-core job after each attempt takes its end in, whatever it was")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: list[str] = Field([], description="nodes never to use")
    exclude_hours: Positive = Field(24.0, description="how long a node that failed a run is left out by that run")
    gpus: bool = Field(True, description="ask for a GPU a process (--gpus-per-node); false: for CPUs alone")
    cpus_per_task: PositiveInt | None = Field(
        None, description="CPUs of a node; null: what its processes' threads and loader workers come to"
    )
    signal: Literal["USR2", "USR1", "TERM"] = Field("USR2", description="signal that announces the time limit")
    notice_seconds: PositiveInt = Field(120, description="how long before the time limit it is sent")
    setup: list[str] = Field([], description="shell lines before srun: modules, a venv")
    python: str | None = Field(None, description="command that starts Python on a node; null: the one that submits")
    srun: list[str] = Field([], description="further options of srun, e.g. --container-image=...")
    extra: dict[str, str] = Field({}, description='further #SBATCH options, by name; "" for one without a value')
    poll_seconds: Positive = Field(10.0, description="squeue and sacct are asked at most this often by a process")

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, str]) -> dict[str, str]:
        for name, value in extra.items():
            if not re.fullmatch("[a-z][a-z0-9-]+", name):
                raise ValueError(f"{name!r} is no option of sbatch: write its long name, without the dashes before it")
            if "\n" in value:
                raise ValueError(f"{name} has a line break in it, and an #SBATCH option is one line")
            if field := ALREADY_SAID.get(name):
                raise ValueError(f"{name} is said by {field}, not by extra")
            if why := NEVER_SAID.get(name):
                raise ValueError(f"{name} cannot be set: {why}")
        return extra


class ClusterProfile(Section):
    """One cluster. Only the section of its own launcher may be there."""

    name: str
    launcher: Literal["local", "slurm", "kubernetes"]
    gpus_per_node: int | None = Field(None, ge=0, description="processes that a node can hold; null: not checked")
    sustained_tflops: Positive | None = Field(
        None, description="what one process reaches, in TFLOP/s; `plan` derives hours from it and says so"
    )
    node_mtbf_hours: Positive | None = Field(
        None, description="hours that one node runs from failure to failure, on average: for `checkpoints.every: auto`"
    )
    write_mb_s: Positive | None = Field(
        None,
        description="MB (10^6 bytes) a second that one node writes to the folder of runs, as `dinoctl doctor` measures "
        "it; `plan` derives from it how long a save takes",
    )
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None


def profiles() -> dict[str, Path]:
    """The profiles by name: those in ./clusters, then those beside dinoctl itself."""
    folders = (Path(__file__).parent.parent / "clusters", Path("clusters"))
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def read_cluster(name_or_file: str) -> ClusterProfile:
    """The profile of that name, or in that file. Raises SpecError with every mistake in it."""
    if "/" in name_or_file or name_or_file.endswith((".yaml", ".yml")):
        file = name_or_file
    else:
        known = profiles()
        if name_or_file not in known:
            raise SpecError([_unknown(name_or_file, list(known))])
        file = str(known[name_or_file])
    document = read_yaml(file)
    profile, problems = validate(ClusterProfile, document.values, ())
    problems = [*problems, *_sections(document.values)]
    if problems or profile is None:
        raise SpecError(problem.placed(file, document.lines) for problem in problems)
    return profile


def _unknown(name: str, known: list[str]) -> Problem:
    return Problem("no such cluster", ("cluster",), found=name, allowed=f"{listed(known)}, or a file",
                   hint=did_you_mean(name, known) or "write the profile to clusters/NAME.yaml")  # fmt: skip


def _sections(values: dict[str, Any]) -> list[Problem]:
    launcher = values.get("launcher")
    problems = [
        Problem("a section of another launcher", (name,), found=name, allowed=f"launcher: {name}")
        for name in ("slurm", "kubernetes")
        if values.get(name) is not None and launcher in ("local", "slurm", "kubernetes") and launcher != name
    ]
    if launcher == "kubernetes" and values.get("kubernetes") is None:
        problems.append(Problem("missing", ("kubernetes",), allowed="a section with at least `image`"))
    return problems
