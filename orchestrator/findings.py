"""What `dinoctl doctor` examines and what it says: one line a check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from orchestrator import notice, stakes
from orchestrator.cluster import ClusterProfile, Slurm
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.notice import Notice
from orchestrator.spec import Job

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One check. todo: what to do about it; empty if it is ok."""

    level: Level
    check: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        todo = f"\n{'':<24}-> {self.todo}" if self.todo else ""
        return f"{self.level:<8} {self.check:<14} {self.found}{todo}"


def ok(check: str, found: str) -> Finding:
    return Finding("ok", check, found)


def warning(check: str, found: str, todo: str) -> Finding:
    return Finding("warning", check, found, todo)


def wrong(check: str, found: str, todo: str) -> Finding:
    return Finding("wrong", check, found, todo)


@dataclass(frozen=True)
class Patient:
    """What is examined: a cluster, for this job if one was named, else for any."""

    cluster: ClusterProfile
    job: Job | None
    runs: str
    nodes: int  # that take part in the checks by jobs

    @property
    def slurm(self) -> Slurm:
        """What sbatch is told."""
        if self.job is None:
            return self.cluster.slurm or Slurm()
        return stakes.section(self.job, self.cluster, next(iter(self.job.phases)))

    @property
    def kubernetes(self) -> Kubernetes:
        """What the pods are made of."""
        if self.job is None:
            assert self.cluster.kubernetes is not None  # a profile of that launcher has one
            return self.cluster.kubernetes
        return stakes.pods(self.job, self.cluster, next(iter(self.job.phases)))

    @property
    def needed(self) -> int:
        """Nodes that the widest phase asks for."""
        return max((phase.resources.nodes for phase in self.job.phases.values()), default=1) if self.job else 1

    @property
    def processes(self) -> int:
        """Of a node, one a GPU."""
        if self.job is None:
            return self.cluster.gpus_per_node or 1
        return max(phase.resources.processes_per_node for phase in self.job.phases.values())

    @property
    def run_dir(self) -> str | None:
        return f"{self.runs}/{self.job.name}" if self.job else None


def preemption(patient: Patient) -> Notice | None:
    """How long a preemption's notice is there. None: this machine preempts nobody. Raises NoAnswerError, ValueError."""
    match patient.cluster.launcher:
        case "slurm":
            return stakes.ask_notice(patient.slurm)
        case "kubernetes":
            return notice.of_pods(patient.kubernetes)
        case _:
            return None


def attempt_options(patient: Patient, nodes: int) -> list[str]:
    """Where and with what attempts run, as options of sbatch."""
    slurm, gpus = patient.slurm, patient.cluster.gpus_per_node
    options = [f"--{name}={value}" for name in ("partition", "account", "qos", "constraint", "reservation")
               if (value := getattr(slurm, name))]  # fmt: skip
    options += [f"--exclude={','.join(slurm.exclude)}"] if slurm.exclude else []
    options += [f"--gpus-per-node={gpus}"] if slurm.gpus and gpus else []
    options += [f"--{name}={value}" if value else f"--{name}" for name, value in slurm.extra.items()]
    return [*options, f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]


def about_saves(patient: Patient, found: Notice, write_mb_s: float | None) -> Iterator[Finding]:
    """Whether the job's saves fit into the notice, and where what was set contradicts the cluster."""
    job = patient.job
    if job is None:
        return
    for cost in stakes.costs(found, stakes.works(job, patient.cluster, patient.run_dir, write_mb_s)):
        if cost.fits:
            yield ok("save", cost.text)
        elif cost.fits is False:
            yield warning("save", cost.text, "see runbooks/notice-too-short.md")
        else:
            yield warning("save", cost.text, "set write_mb_s in the profile to what is measured below")
    if write_mb_s is None:
        for line in stakes.contradictions(job, patient.cluster, found):
            yield warning("notice", line, "see runbooks/notice-too-short.md")
