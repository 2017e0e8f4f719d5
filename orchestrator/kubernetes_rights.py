"""What dinoctl does on a Kubernetes cluster, verb by verb, and what does not work without it. Asked of the cluster by
`dinoctl doctor`, granted by clusters/kubernetes/controller.yaml, and no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.asking_kubernetes import Api

REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True)
class Right:
    """To `verb` what `resource` names, of the API group `group` ("": the core's). Without it `feature` does not work;
    `vital`: then no run does."""

    verb: str
    group: str
    resource: str  # and its subresource: pods/log
    feature: str
    vital: bool = True
    everywhere: bool = False  # of no namespace: granted by a ClusterRole

    @property
    def words(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


SUBMIT = "submit: an attempt is sent"
OBSERVE = "observe: what became of attempts is seen, and an attempt of a controller that died is found"
END = "cancel and clear: an attempt is ended, and what is left of it removed"
KILL = "cancel --now: the pods of an attempt are ended without their grace"
WHY = "why: what an attempt waits for, or what ended it, is said in the cluster's words"
NODES = "nodes: how many can be used, for resources.min_nodes"
LOGS = "doctor: what its pods printed, where they cannot write to the folder of runs"

WHAT_AN_ATTEMPT_IS = {
    "indexed-job": ("batch", "jobs"),
    "pod-group": ("batch", "jobs"),
    "jobset": ("jobset.x-k8s.io", "jobsets"),
    "volcano": ("batch.volcano.sh", "jobs"),
}
"""Scheduler -> API group and resource."""

PODS = (
    Right("list", "", "pods", OBSERVE),
    Right("watch", "", "pods", OBSERVE),
    Right("deletecollection", "", "pods", KILL, vital=False),
    Right("list", "", "events", WHY, vital=False),
)
WITH_SERVICE = (Right("create", "", "services", SUBMIT), Right("delete", "", "services", END))
"""A plain Job has a Service of its own, so that its pods find each other by name."""
WITH_GROUP = tuple(
    Right(verb, "scheduling.k8s.io", "podgroups", feature)
    for verb, feature in {"create": SUBMIT, "list": END, "delete": END}.items()
)
"""All or none of its pods are placed."""

OF_NODES = (Right("list", "", "nodes", NODES, vital=False, everywhere=True),)
OF_DOCTOR = (Right("get", "", "pods/log", LOGS, vital=False),)


def of_controller(scheduler: str) -> list[Right]:
    """What a controller needs in its namespace where attempts are sent to that scheduler."""
    group, resource = WHAT_AN_ATTEMPT_IS[scheduler]
    features = {"create": SUBMIT, "list": OBSERVE, "watch": OBSERVE, "delete": END}
    own = [Right(verb, group, resource, feature) for verb, feature in features.items()]
    services = WITH_SERVICE if scheduler in ("indexed-job", "pod-group") else ()
    groups = WITH_GROUP if scheduler == "pod-group" else ()
    return [*own, *services, *groups, Right("list", "", "services", END), *PODS]


def rights(scheduler: str) -> list[Right]:
    """All that dinoctl ever does on a cluster where attempts are sent to that scheduler."""
    return [*of_controller(scheduler), *OF_NODES, *OF_DOCTOR]


def allowed(api: Api, namespace: str, right: Right) -> bool:
    """Whether the cluster grants that to whoever asks. Raises NoAnswerError, RefusedError."""
    resource, _, subresource = right.resource.partition("/")
    asked = {"verb": right.verb, "group": right.group, "resource": resource, "subresource": subresource}
    where = {} if right.everywhere else {"namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {**asked, **where}},
    }  # fmt: skip
    return bool(api.post(REVIEWS, review)["status"].get("allowed", False))


def missing(api: Api, namespace: str, scheduler: str) -> list[Right]:
    """The rights that are not granted. Raises NoAnswerError, RefusedError."""
    return [right for right in rights(scheduler) if not allowed(api, namespace, right)]


def without(granted: Sequence[Right], *taken: Right) -> list[Right]:
    return [right for right in granted if right not in taken]


def rules(granted: Sequence[Right]) -> list[dict[str, Any]]:
    """As a Role or ClusterRole has them: one rule a resource."""
    found: dict[tuple[str, str], list[str]] = {}
    for right in granted:
        found.setdefault((right.group, right.resource), []).append(right.verb)
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": verbs} for (group, resource), verbs in found.items()
    ]
