"""What is kept of the cluster's objects: of a Job, JobSet or Volcano Job, and of a pod, what tells how they fare. Pure.

A thousand attempts have tens of thousands of pods, and a pod is ten kilobytes of JSON: what is kept is a hundredth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

MANAGED_BY = "app.kubernetes.io/managed-by"
RUN_ID, NAME, ATTEMPT, PHASE = "dinoctl/run-id", "dinoctl/name", "dinoctl/attempt", "dinoctl/phase"
"""Labels of everything that is made for an attempt, and of nothing else."""

DIGEST = "dinoctl/digest"
"""An annotation, as a label has 63 characters at most."""

OURS = f"{MANAGED_BY}=dinoctl"

ROLE, CONTAINER = "node", "agent"
"""What an attempt's pods are called in a JobSet and in Volcano's Job, and the one container of each."""

OVERDUE_SECONDS = 60.0
"""How long after the end of its grace a pod may still be there before whoever should end it is taken for gone."""

POD_GROUP_API = "v1alpha2"
"""Of scheduling.k8s.io, where a profile does not say."""

KINDS = {
    "indexed-job": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "pod-group": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "jobset": "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets",
    "volcano": "/apis/batch.volcano.sh/v1alpha1/namespaces/{namespace}/jobs",
}
"""By `kubernetes.scheduler`: where the objects lie that an attempt is."""


@dataclass(frozen=True)
class Condition:
    """`since`: when it last changed, seconds since the epoch by the cluster's clock."""

    kind: str
    true: bool
    reason: str = ""
    message: str = ""
    since: float = 0.0


@dataclass(frozen=True)
class Job:
    """What an attempt is on the cluster, whatever its kind. state: Volcano's word, where there is one."""

    name: str
    uid: str
    run_id: str
    digest: str
    created: float
    nodes: int
    deleting: bool = False
    suspended: bool = False
    queue: str = ""
    state: str = ""
    conditions: tuple[Condition, ...] = ()

    def condition(self, *kinds: str) -> Condition | None:
        return next((one for one in self.conditions if one.true and one.kind in kinds), None)


@dataclass(frozen=True)
class Pod:
    """One pod. owner: the uid of the Job, JobSet or Volcano Job; `waiting`: why its container does not run yet;
    `ended`: how the container ended. `deleted_by`: when its grace is over, if somebody deleted it."""

    name: str
    uid: str
    owner: str
    job: str  # the launch name
    run_id: str
    digest: str
    index: str
    created: float
    phase: str
    node: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Condition, ...] = ()
    waiting: Condition | None = None
    ended: Ended | None = None
    ready: bool = False  # as the kubelet says of the container; the pod's own condition may be the controller's
    deleted_by: float | None = None

    def condition(self, kind: str) -> Condition | None:
        return next((one for one in self.conditions if one.kind == kind), None)

    @property
    def bound_at(self) -> float | None:
        """When it was given a node; None: it has none."""
        scheduled = self.condition("PodScheduled")
        return (scheduled.since if scheduled and scheduled.true else self.created) if self.node else None

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def disruption(self) -> Condition | None:
        found = self.condition("DisruptionTarget")
        return found if found and found.true else None

    @property
    def silent_since(self) -> float | None:
        """Since when its node is not heard of, seconds since the epoch: the controller took back Ready, and the kubelet
        that would say why is silent. None: it is heard of."""
        ready = self.condition("Ready")
        return ready.since if self.phase == "Running" and self.ready and ready and not ready.true else None

    def lives(self, now: float) -> bool:
        """Whether its processes are to be reckoned with. now: seconds since the epoch."""
        overdue = self.deleted_by is not None and now > self.deleted_by + OVERDUE_SECONDS
        return bool(self.node) and not (self.is_over or self.silent_since is not None or overdue)


@dataclass(frozen=True)
class Ended:
    code: int
    reason: str = ""
    message: str = ""
    at: float = 0.0


def job(item: Mapping[str, Any]) -> Job:
    """From the JSON of a Job, a JobSet or a Volcano Job."""
    meta, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    labels = meta.get("labels") or {}
    state = status.get("state") or {}  # Volcano's; its `conditions` have another shape
    return Job(
        name=meta["name"], uid=meta["uid"], run_id=labels.get(RUN_ID, ""), digest=_digest(meta),
        created=seconds(meta.get("creationTimestamp")), nodes=_nodes(spec), deleting="deletionTimestamp" in meta,
        suspended=bool(spec.get("suspend")), queue=labels.get("kueue.x-k8s.io/queue-name") or spec.get("queue") or "",
        state=state.get("phase", ""), conditions=() if state else _conditions(status.get("conditions")),
    )  # fmt: skip


def _nodes(spec: Mapping[str, Any]) -> int:
    for replicated in spec.get("replicatedJobs") or ():
        return int(replicated["template"]["spec"].get("parallelism") or 1)
    return int(spec.get("parallelism") or spec.get("minAvailable") or 1)


def pod(item: Mapping[str, Any]) -> Pod:
    """From the JSON of a pod."""
    meta, status = item["metadata"], item.get("status") or {}
    labels, deleted = meta.get("labels") or {}, meta.get("deletionTimestamp")
    containers = [one for one in status.get("containerStatuses") or () if one.get("name") == CONTAINER]
    container = containers[0] if containers else {}
    return Pod(
        name=meta["name"], uid=meta["uid"], owner=_owner(meta), job=labels.get(NAME, ""),
        run_id=labels.get(RUN_ID, ""), digest=_digest(meta),
        index=labels.get("batch.kubernetes.io/job-completion-index") or labels.get("volcano.sh/task-index") or "",
        created=seconds(meta.get("creationTimestamp")), phase=status.get("phase", ""),
        node=(item.get("spec") or {}).get("nodeName") or "", reason=status.get("reason", ""),
        message=_line(status.get("message")), conditions=_conditions(status.get("conditions")),
        waiting=_waiting(container), ended=_ended(container), ready=bool(container.get("ready")),
        deleted_by=seconds(deleted) if deleted else None,
    )  # fmt: skip


def _owner(meta: Mapping[str, Any]) -> str:
    """A JobSet's pods belong to a Job of it, and carry the JobSet's own uid as a label."""
    labels = meta.get("labels") or {}
    owners = [one["uid"] for one in meta.get("ownerReferences") or () if one.get("controller")]
    return str(labels.get("jobset.sigs.k8s.io/jobset-uid") or next(iter(owners), ""))


def _digest(meta: Mapping[str, Any]) -> str:
    return str((meta.get("annotations") or {}).get(DIGEST, ""))


def _conditions(items: Any) -> tuple[Condition, ...]:
    return tuple(
        Condition(
            one.get("type", ""), one.get("status") == "True", one.get("reason") or "", _line(one.get("message")),
            seconds(one.get("lastTransitionTime")),
        )
        for one in items or ()
    )  # fmt: skip


def _waiting(container: Mapping[str, Any]) -> Condition | None:
    waiting = (container.get("state") or {}).get("waiting")
    if not waiting:
        return None
    return Condition("waiting", True, waiting.get("reason") or "", _line(waiting.get("message")))


def _ended(container: Mapping[str, Any]) -> Ended | None:
    ended = (container.get("state") or {}).get("terminated")
    if not ended:
        return None
    return Ended(
        int(ended.get("exitCode", 0)), ended.get("reason") or "", _line(ended.get("message")),
        seconds(ended.get("finishedAt")),
    )  # fmt: skip


def seconds(text: str | None) -> float:
    """A time as Kubernetes writes it, in seconds since the epoch; 0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
