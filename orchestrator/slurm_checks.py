"""What a job says to Slurm beside its cluster's profile (`resources.slurm`), looked at before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator

from model.config import Resources, read
from orchestrator import sections
from orchestrator.cluster import ClusterProfile, Slurm
from orchestrator.draft import Draft
from orchestrator.problems import Path, Problem
from orchestrator.validation import validate

AT = ("resources", "slurm")


def all_problems(draft: Draft) -> Iterator[Problem]:
    """Fields that sbatch is not told, values that it does not take, notices longer than the whole job."""
    for at, resources in stages(draft):
        _, problems = validate(Slurm, resources.slurm, (*at, *AT))
        yield from problems
        if not problems and draft.cluster is not None and draft.cluster.launcher == "slurm":
            yield from _notice(draft.cluster, resources, at)


def stages(draft: Draft) -> list[tuple[Path, Resources]]:
    """Where each stage's resources stand in the job, and what they are."""
    found: list[tuple[Path, Resources]] = [(("phases", name), phase.resources) for name, phase in draft.phases.items()]
    if draft.evaluate is not None:
        found.append((("evaluate",), draft.evaluate.resources))
    return found


def _notice(cluster: ClusterProfile, resources: Resources, at: Path) -> Iterator[Problem]:
    """A time limit that is announced before the job begins would stop it at its first step, again and again."""
    profile, own = cluster.model_dump(mode="json"), resources.model_dump(mode="json")
    section, limit = read(Slurm, sections.merged("slurm", profile, own)), resources.time_limit_minutes
    if limit is not None and limit * 60 <= section.notice_seconds:
        yield Problem("the time limit is announced before the job begins", (*at, "resources", "time_limit_minutes"),
                      found=f"{limit} minutes, announced {section.notice_seconds} s before (slurm.notice_seconds)",
                      allowed=f"{section.notice_seconds // 60 + 1} or more")  # fmt: skip


def elsewhere(resources: Resources, cluster: ClusterProfile) -> str:
    """A remark on a job that says something to Slurm and runs on another kind of cluster; empty if it does not."""
    if not resources.slurm or cluster.launcher == "slurm":
        return ""
    return f"says nothing to cluster {cluster.name}, whose launcher is {cluster.launcher}"
