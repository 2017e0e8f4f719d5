"""What a Job, its pods and its events mean for an attempt, and for a person who asks. Pure; ends: `kubernetes_ends`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.contract import Cause
from orchestrator.launchers import kubernetes_ends
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.launchers.kubernetes_records import ROLE, Job, Pod

FINISHING = ("Complete", "Completed", "Failed", "FailureTarget", "SuccessCriteriaMet")
"""Conditions of a Job or JobSet of which no pod is made any more; those that are left are being ended."""

FINISHING_STATES = ("Completing", "Completed", "Failed", "Terminating", "Terminated", "Aborting", "Aborted")
"""Volcano's words for the same."""

WONDER_SECONDS = 3.0
"""How long pods may be missing, or a container take to start, before events are asked why."""

STUCK = {
    "ErrImagePull": "the image cannot be pulled: see kubernetes.image and kubernetes.pull_secrets",
    "ImagePullBackOff": "the image cannot be pulled: see kubernetes.image and kubernetes.pull_secrets",
    "ErrImageNeverPull": "the image is not on the node, and kubernetes.pull_policy is Never",
    "InvalidImageName": "kubernetes.image is not the name of an image",
    "ImageInspectError": "the node has the image in a form that it cannot read",
    "CreateContainerConfigError": "a Secret or ConfigMap that kubernetes.secret_env or env_from_secrets names is not "
    "there, or the image's user is root and may not be: see kubernetes.run_as_user",
    "CreateContainerError": "the node cannot make its container",
    "RunContainerError": "the node cannot start its container",
}
"""Why a container waits that will not start by itself, and what to look at."""

MOUNTS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox")
"""Events of a pod that has a node and does not get its volumes or its network there."""


@dataclass(frozen=True)
class Event:
    """Something that the cluster said of an object."""

    of: str  # the object's name
    reason: str
    message: str
    at: float  # seconds since the epoch


@dataclass(frozen=True)
class Known:
    """What dinoctl itself knows of an attempt. Bounds: see the section `kubernetes` of a profile."""

    handle: dict[str, Any]
    gang_seconds: float
    lost_seconds: float
    recorded: float = 0.0  # when it recorded its last step, seconds since the epoch; asked for where a node is silent


def wonders(job: Job, pods: Sequence[Pod], now: float) -> list[str]:
    """The names of objects of which events tell what the objects themselves don't."""
    if (
        not is_finishing(job)
        and len(_there(pods)) < job.nodes
        and not job.suspended
        and now - job.created > WONDER_SECONDS
    ):
        return [job.name, f"{job.name}-{ROLE}-0"]  # a JobSet's pods are made by the Job in it
    if is_finishing(job):
        return kubernetes_ends.wonders(job, pods)
    slow = [pod for pod in pods if pod.bound_at and pod.phase == "Pending" and now - pod.bound_at > WONDER_SECONDS]
    unexplained = [pod for pod in slow if pod.waiting is None or pod.waiting.reason not in STUCK]
    return [pod.name for pod in unexplained[:1]]


def is_finishing(job: Job) -> bool:
    return job.condition(*FINISHING) is not None or job.state in FINISHING_STATES


def is_placing(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether some of its pods have not started yet."""
    there = _there(pods)
    return len(there) < job.nodes or any(pod.phase == "Pending" for pod in there)


def _there(pods: Sequence[Pod]) -> list[Pod]:
    """Without those that were deleted and have ended, as of a job that was suspended and goes on."""
    return [pod for pod in pods if not (pod.is_over and pod.deleted_by is not None)]


def observation(job: Job, pods: Sequence[Pod], events: Sequence[Event], known: Known, now: float) -> Observation:
    """What the cluster tells of an attempt. pods: all of the job's; events: of what `wonders` named; now: seconds since
    the epoch."""
    nodes = tuple(dict.fromkeys(pod.node for pod in sorted(pods, key=_order) if pod.node))
    living = [pod for pod in pods if pod.lives(now)]
    if not (is_finishing(job) or job.deleting):
        return _silent(job, pods, known, nodes, now) or _placing(job, pods, events, known, nodes, now)
    if living:
        doing = "is being stopped" if job.deleting else "is being ended"
        detail = f"job {job.name}{on(nodes)} {doing}: {_left(living)}"
        return Observation(LaunchState.RUNNING, known.handle, detail, nodes=nodes)
    end = kubernetes_ends.end(job, pods, events)
    detail = f"{end.detail}; {_suspended(job)} while it ran" if job.suspended else end.detail
    return Observation(LaunchState.ENDED, known.handle, detail, end.cause, end.bad_nodes, nodes)


def _silent(job: Job, pods: Sequence[Pod], known: Known, nodes: tuple[str, ...], now: float) -> Observation | None:
    """Of an attempt some of whose nodes are not heard of; None: there are none.

    They may be lost. Or the API server was away: when it is back it has not heard of anybody. An attempt that goes on
    recording steps, for which all its processes are needed, has lost none.
    """
    silent = [pod for pod in pods if pod.silent_since is not None]
    if not silent:
        return None
    since = max(known.recorded, min(pod.silent_since or now for pod in silent))
    if now - since > known.lost_seconds:
        end = kubernetes_ends.lost(silent)
        return Observation(LaunchState.ENDED, known.handle, end.detail, end.cause, end.bad_nodes, nodes)
    who = few(sorted({pod.node for pod in silent}))
    left = max(known.lost_seconds - (now - since), 0.0)
    detail = f"job {job.name}{on(nodes)}; not heard of: {who}; given up in {left:.0f} s unless it records a step"
    return Observation(LaunchState.RUNNING, known.handle, detail, nodes=nodes)


def _order(pod: Pod) -> tuple[int, str]:
    return (int(pod.index) if pod.index.isdecimal() else 0, pod.name)


def _suspended(job: Job) -> str:
    return f"{f'queue {job.queue} (Kueue)' if job.queue else 'somebody'} suspended it"


def _left(living: Sequence[Pod]) -> str:
    return f"{len(living)} {'pod has' if len(living) == 1 else 'pods have'} not ended yet"


def on(nodes: Sequence[str]) -> str:
    """Where it is, in a few words."""
    return f" on {few(nodes)}" if nodes else ""


def few(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


# --- on its way ---------------------------------------------------------------------------------------------------


def _placing(
    job: Job, pods: Sequence[Pod], events: Sequence[Event], known: Known, nodes: tuple[str, ...], now: float
) -> Observation:
    there, handle, gang = _there(pods), known.handle, known.gang_seconds
    bound = [pod for pod in there if pod.node]
    if not bound:
        return _unplaced(job, there, events, known, now)
    why = _why_not_all(job, there, events)
    if len(bound) < job.nodes:
        since = min(pod.bound_at or now for pod in bound)
        words = f"job {job.name}: {len(bound)} of {job.nodes} pods have a node, the others none{why}"
        if now - since > gang:
            detail = f"{words}; all were given back after {gang:g} s"
            return Observation(LaunchState.ENDED, handle, detail, Cause.UNPLACED, nodes=nodes)
        left = max(gang - (now - since), 0.0)
        return Observation(LaunchState.PENDING, handle, f"{words}; given back in {left:.0f} s", nodes=nodes)
    if any(pod.phase == "Pending" for pod in bound):
        return _starting(job, bound, events, known, nodes, now)
    return Observation(LaunchState.RUNNING, handle, f"job {job.name}{on(nodes)}{_note(pods)}", nodes=nodes)


def _unplaced(job: Job, pods: Sequence[Pod], events: Sequence[Event], known: Known, now: float) -> Observation:
    """No pod has a node: that may take as long as it takes, and holds nothing that others wait for."""
    handle, where = known.handle, f" in queue {job.queue}" if job.queue else ""
    if job.suspended:
        why = "it is suspended until the queue admits it (Kueue)" if job.queue else _suspended(job)
        return Observation(LaunchState.PENDING, handle, f"job {job.name} waits{where}: {why}")
    why = _why_not_all(job, pods, events)
    refused = _refused(job, events)
    if not pods and refused and "exceeded quota" not in refused and now - job.created > known.gang_seconds:
        detail = f"job {job.name}: the cluster makes none of its pods{why}"
        return Observation(LaunchState.ENDED, handle, detail, Cause.NOT_LAUNCHED)
    number = f"none of its {job.nodes} pods has" if job.nodes > 1 else "its pod does not have"
    return Observation(LaunchState.PENDING, handle, f"job {job.name} waits{where}: {number} a node yet{why}")


def _starting(
    job: Job, bound: Sequence[Pod], events: Sequence[Event], known: Known, nodes: tuple[str, ...], now: float
) -> Observation:
    handle, starting = known.handle, [pod for pod in bound if pod.phase == "Pending"]
    for pod in starting:
        why = _stuck(pod, events)
        if why is None:
            continue
        detail = f"job {job.name}: pod {pod.name} on {pod.node} does not start: {why}"
        if now - (pod.bound_at or now) > known.gang_seconds:
            return Observation(LaunchState.ENDED, handle, detail, Cause.NOT_LAUNCHED, nodes=nodes)
        return Observation(LaunchState.PENDING, handle, detail, nodes=nodes)
    up = len(bound) - len(starting)
    detail = f"job {job.name}{on(nodes)}: {up} of {job.nodes} pods have started; the others are made ready"
    return Observation(LaunchState.PENDING, handle, detail, nodes=nodes)


def _stuck(pod: Pod, events: Sequence[Event]) -> str | None:
    """Why a pod that has a node will not start by itself; None: nothing says that it won't."""
    if pod.waiting and (advice := STUCK.get(pod.waiting.reason)):
        words = f": {pod.waiting.message}" if pod.waiting.message else ""
        return f"{pod.waiting.reason}{words}; {advice}"
    if pod.waiting and pod.waiting.reason not in ("ContainerCreating", "PodInitializing"):
        return None
    said = [event for event in events if event.of == pod.name and event.reason in MOUNTS]
    if not said:
        return None
    last = max(said, key=lambda event: event.at)
    return f"{last.reason}: {last.message}; see kubernetes.volumes"


def _why_not_all(job: Job, pods: Sequence[Pod], events: Sequence[Event]) -> str:
    """The scheduler's reason for a pod without a node, or the controller's for one that it could not make."""
    for pod in pods:
        scheduled = pod.condition("PodScheduled")
        if not pod.node and scheduled and not scheduled.true and (scheduled.message or scheduled.reason):
            return f": {scheduled.message or scheduled.reason}"
    refused = _refused(job, events)
    if not refused:
        return ""
    return f": {refused}" + ("; a quota of the namespace is used up" if "exceeded quota" in refused else "")


def _refused(job: Job, events: Sequence[Event]) -> str:
    """The last FailedCreate of the job, by which the cluster says why it cannot make pods."""
    made_by = (job.name, f"{job.name}-{ROLE}-0")
    said = [event for event in events if event.of in made_by and event.reason == "FailedCreate"]
    return max(said, key=lambda event: event.at).message if said else ""


def _note(pods: Sequence[Pod]) -> str:
    for pod in pods:
        if pod.disruption and not pod.is_over:
            return f", {kubernetes_ends.disruption(pod)}, and is being stopped"
    return ""


# --- gone ---------------------------------------------------------------------------------------------------------


def gone(name: str, pods: Sequence[Pod], handle: dict[str, Any], now: float) -> Observation:
    """Of a job that the cluster does not have any more. pods: those that it made and that are still there."""
    nodes = tuple(dict.fromkeys(pod.node for pod in sorted(pods, key=_order) if pod.node))
    if living := [pod for pod in pods if pod.lives(now)]:
        detail = f"job {name} was deleted, and {_left(living)}{on(nodes)}"
        return Observation(LaunchState.RUNNING, handle, detail, nodes=nodes)
    detail = f"its job {name} was deleted: by hand, by a time to live, or with its namespace"
    return Observation(LaunchState.ENDED, handle, detail, Cause.VANISHED, nodes=nodes)
