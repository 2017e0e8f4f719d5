"""What a job says to Kubernetes beside its cluster's profile (`resources.kubernetes`), looked at before anything is
queued."""

from __future__ import annotations

from collections.abc import Iterator

from model.config import Resources, read
from orchestrator import sections
from orchestrator.cluster import ClusterProfile
from orchestrator.draft import Draft
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.problems import Path, Problem
from orchestrator.slurm_checks import stages
from orchestrator.validation import validate

AT = ("resources", "kubernetes")
ELSEWHERE = {"kubernetes": {"image": "none"}}
"""Stands for the profile of a job that runs on another kind of cluster: what it says to this kind is still read."""


def all_problems(draft: Draft) -> Iterator[Problem]:
    """Fields that do not exist, values that the API server does not take, time limits that the grace uses up."""
    there = draft.cluster is not None and draft.cluster.launcher == "kubernetes"
    profile = draft.cluster.model_dump(mode="json") if draft.cluster and there else ELSEWHERE
    for at, resources in stages(draft):
        own = resources.model_dump(mode="json")
        if not own["kubernetes"] and not there:
            continue
        merged = sections.merged("kubernetes", profile, own)
        _, problems = validate(Kubernetes, merged, (*at, *AT))
        yield from problems
        if not problems and there:
            yield from _grace(read(Kubernetes, merged), resources, at)


def _grace(section: Kubernetes, resources: Resources, at: Path) -> Iterator[Problem]:
    """A pod that is asked to stop as it starts would stop at its first step, again and again."""
    limit = resources.time_limit_minutes
    if limit is not None and limit * 60 <= section.grace_seconds:
        yield Problem("the time limit is over before the pods start", (*at, "resources", "time_limit_minutes"),
                      found=f"{limit} minutes, of which {section.grace_seconds} s are for stopping "
                            "(kubernetes.grace_seconds)",
                      allowed=f"{section.grace_seconds // 60 + 1} or more")  # fmt: skip


def elsewhere(resources: Resources, cluster: ClusterProfile) -> str:
    """A remark on a job that says something to Kubernetes and runs on another kind of cluster; empty if it does not."""
    if not resources.kubernetes or cluster.launcher == "kubernetes":
        return ""
    return f"says nothing to cluster {cluster.name}, whose launcher is {cluster.launcher}"
