"""What a job says to Kubernetes beside its cluster's profile (`resources.kubernetes`), and what of a job its pods could
not see or would not be told in time; looked at before anything is queued."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from model import storage
from model.config import AnyPhase, Data, Evaluate, Resources, read
from orchestrator import code, handoff, sections
from orchestrator.cluster import ClusterProfile
from orchestrator.draft import Draft
from orchestrator.kubernetes_section import Kubernetes
from orchestrator.problems import Path, Problem, listed
from orchestrator.slurm_checks import stages
from orchestrator.validation import validate

if TYPE_CHECKING:
    from orchestrator.spec import Job

AT = ("resources", "kubernetes")

ELSEWHERE = {"kubernetes": {"image": "none"}}
"""Stands for the profile of a job that runs on another kind of cluster: what it says to this kind is still read."""

OF_THE_CLUSTER = {
    "context": "dinoctl looks for the attempts of all runs there",
    "image": "the code comes with it, and a run has one",
    "poll_seconds": "the API server is asked once for all runs",
}
"""Fields that a job cannot have other than its cluster's profile, and why."""

ENDING_SECONDS = 10
"""What an agent needs after the kill of its ranks to bring the logs and to publish how it ended."""


def all_problems(draft: Draft) -> Iterator[Problem]:
    """Fields that do not exist, values that the API server does not take, what is the profile's alone to say, and time
    limits that the grace uses up."""
    there = draft.cluster is not None and draft.cluster.launcher == "kubernetes"
    profile = draft.cluster.model_dump(mode="json") if draft.cluster and there else ELSEWHERE
    for at, resources in stages(draft):
        own = resources.model_dump(mode="json")
        if not own["kubernetes"] and not there:
            continue
        merged = sections.merged("kubernetes", profile, own)
        _, problems = validate(Kubernetes, merged, (*at, *AT))
        yield from problems
        if there:
            yield from _of_the_cluster(own["kubernetes"], (*at, *AT))
        if not problems and there:
            yield from _grace(read(Kubernetes, merged), resources, at)


def _of_the_cluster(own: Mapping[str, Any], at: Path) -> Iterator[Problem]:
    for name, why in OF_THE_CLUSTER.items():
        if name in own:
            yield Problem(f"it is the cluster's: {why}", (*at, name), found=str(own[name]),
                          hint="write a profile of your own, and name its file: cluster=FILE.yaml")  # fmt: skip


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


# --- what is remarked on by `validate` and `plan`, and refused by `submit` where nothing could come of it -------------


def refusals(job: Job, cluster: ClusterProfile, runs: str) -> list[Problem]:
    """What `submit` does not send to a cluster of pods. runs: the folder of runs."""
    if cluster.launcher != "kubernetes":
        return []
    return [*_controller(job), *_unpinned(cluster), *_runs(job, cluster, runs), *_unseen(job, cluster)]


def remarks(job: Job, cluster: ClusterProfile) -> Iterator[tuple[Path, str]]:
    """By path. What depends on the folder of runs is left to `submit`, which knows it."""
    if cluster.launcher != "kubernetes":
        return
    for problem in (*_controller(job), *_unpinned(cluster), *_unseen(job, cluster)):
        yield problem.at, f"`submit` refuses it: {problem.message} ({problem.found})"
    for at, stage in _stages(job):
        section, patience = _section(cluster, stage.resources), stage.health.notice_seconds
        if patience + ENDING_SECONDS > section.grace_seconds:
            text = (
                f"with {patience:g} s the pod may be killed before its agent can say how it ended: kubernetes.grace_"
                f"seconds, {section.grace_seconds}, is to be {patience + ENDING_SECONDS:g} or more"
            )
            yield (*at, "health", "notice_seconds"), text


def _controller(job: Job) -> Iterator[Problem]:
    if job.controller.on == "cluster":
        yield Problem("no job keeps a run on Kubernetes going: one Deployment does, for all runs of a folder",
                      ("controller", "on"), found="cluster", allowed="here",
                      hint="clusters/kubernetes/controller.yaml is the Deployment (docs/kubernetes.md)")  # fmt: skip


def _unpinned(cluster: ClusterProfile) -> Iterator[Problem]:
    """Never pulled, an image is what somebody has put on the nodes of a cluster of his own."""
    section = cluster.kubernetes
    if section and section.pull_policy != "Never" and not code.IMAGE_DIGEST.search(section.image):
        yield Problem("the workers' image has no digest, so that its tag could be moved to other code under a run",
                      ("cluster",), found=f"kubernetes.image {section.image} of {cluster.name}",
                      allowed="NAME@sha256:DIGEST", hint="images/README.md says how to get the digest")  # fmt: skip


def _runs(job: Job, cluster: ClusterProfile, runs: str) -> Iterator[Problem]:
    """A run that some phase's pods cannot write to, or that is another folder there than here."""
    if storage.is_uri(runs):
        return
    folder = os.path.abspath(runs)
    for at, stage in _stages(job):
        section = _section(cluster, stage.resources)
        if not _under(folder, [one.path for one in section.volumes.values() if one.here and not one.read_only]):
            there = [one.path for one in section.volumes.values() if one.here and not one.read_only]
            yield Problem(f"the pods of {_name(at)} cannot write there what is read here", ("runs",), found=folder,
                          allowed="s3://BUCKET/PREFIX, or below a volume with `here: true` that is not read-only"
                          + (f": {listed(there)}" if there else "; the profile has none (kubernetes.volumes)"),
                          hint="--runs s3://BUCKET/PREFIX")  # fmt: skip
            return


def _unseen(job: Job, cluster: ClusterProfile) -> Iterator[Problem]:
    """Images, indices and weights on a disk that the pods do not have."""
    spec = job.model_dump(mode="json")
    for at, stage in _stages(job):
        section = _section(cluster, stage.resources)
        mounted = [one.path for one in section.volumes.values()]
        places = [*_data(stage.data, (*at, "data"))]
        if not isinstance(stage, Evaluate):
            places += [((*at, name), text) for name, text in handoff.files(spec, _name(at)).items()]
            named = handoff.references(spec, _name(at)).items()
            places += [((*at, name), ref.run) for name, ref in named if ref.run and os.sep in ref.run]
        for path, text in places:
            if not storage.is_uri(text) and not _under(_in_pods(text, section), mounted):
                cached = text.startswith("cache:")
                local = "a cache is of one machine" if cached else "on this machine's disk"
                yield Problem("the pods cannot see it", path, found=f"{text}: {local}",
                              allowed="a URI, or below a volume of the cluster's profile"
                              + (f": {listed(sorted(mounted))}" if mounted else " (kubernetes.volumes): it has none"),
                              hint="`dinoctl data pack` makes tar shards of a folder; "
                              "docs/kubernetes.md says where data can be")  # fmt: skip


def _in_pods(path: str, section: Kubernetes) -> str:
    """A path as the pods take it. Their cache is in their own /tmp, unless the profile says where it is."""
    name = path.removeprefix("cache:")
    return path if name == path else f"{section.env.get('XDG_CACHE_HOME', '/tmp/.cache')}/dinoctl/{name}"


def _data(data: Data, at: Path) -> Iterator[tuple[Path, str]]:
    for below, part in data.parts:
        yield from (((*at, *below), text) for text in part.shards or (part.shown,))
    if data.index is not None:
        yield (*at, "index"), data.index


def _stages(job: Job) -> list[tuple[Path, AnyPhase | Evaluate]]:
    stages: list[tuple[Path, AnyPhase | Evaluate]] = [(("phases", name), phase) for name, phase in job.phases.items()]
    return [*stages, (("evaluate",), job.evaluate)] if job.evaluate is not None else stages


def _name(at: Path) -> str:
    return str(at[-1])


def _section(cluster: ClusterProfile, resources: Resources) -> Kubernetes:
    profile, own = cluster.model_dump(mode="json"), resources.model_dump(mode="json")
    return read(Kubernetes, sections.merged("kubernetes", profile, own))


def _under(path: str, folders: Iterable[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(folder) for folder in folders)
