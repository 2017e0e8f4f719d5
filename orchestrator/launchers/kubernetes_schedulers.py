"""Three TorchX schedulers, registered as `indexed-job`, `pod-group` and `jobset` (pyproject.toml): what an app is on a
plain cluster.

All make a batch/v1 Indexed Job; of a pod group all pods are placed or none, a JobSet has the Job in it. They create
objects and do nothing else: what became of them is asked in one question for all runs (`kubernetes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler
from torchx.specs import AppDef, AppDryRunInfo, Role

from model.contract import EXIT_CODES
from orchestrator.launchers.kubernetes_pod import Identity, Pods, field, template
from orchestrator.launchers.kubernetes_records import CONTAINER, NAME

JOB_KEY = "batch.kubernetes.io/"
KUEUE = "kueue.x-k8s.io/queue-name"
BESIDE_THE_JOB = ("Service", "PodGroup")
"""What an attempt has beside its Job: if it is there already it is no mistake, as a Job that is would be."""


@dataclass(frozen=True)
class Request:
    """What a dry run answers: the objects in the order of their creation."""

    namespace: str
    objects: list[dict[str, Any]]

    def __str__(self) -> str:
        return str(yaml.safe_dump_all(self.objects, sort_keys=False))


class ObjectsScheduler(Scheduler[dict[str, Any]]):  # type: ignore[misc]  # torchx has no types
    """Creates what `make` makes of an app."""

    def __init__(
        self, backend: str, session: str, make: Callable[[AppDef], list[dict[str, Any]]], client: Any | None
    ) -> None:
        super().__init__(backend, session)
        self._make, self._client = make, client

    def _submit_dryrun(self, app: AppDef, cfg: dict[str, Any]) -> AppDryRunInfo[Request]:
        namespace = Pods.of(app.roles[0]).section.namespace
        return AppDryRunInfo(Request(namespace, self._make(app)), str)

    def schedule(self, dryrun_info: AppDryRunInfo[Request]) -> str:
        """`<namespace>:<name>`. Raises kubernetes.client.ApiException."""
        assert self._client is not None, "a dry run alone"
        request = dryrun_info.request
        for made in request.objects:
            _create(self._client, request.namespace, made)
        return f"{request.namespace}:{request.objects[-1]['metadata']['name']}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        raise NotImplementedError("`dinoctl status` tells")

    def list(self) -> list[ListAppResponse]:
        raise NotImplementedError("`dinoctl status` tells")

    def _cancel_existing(self, app_id: str) -> None:
        raise NotImplementedError("`dinoctl cancel` does it")


def indexed_job(session_name: str, client: Any | None = None, **_: object) -> ObjectsScheduler:
    """A Job and the Service that gives its pods names. For TorchX's entry point."""
    return ObjectsScheduler("indexed-job", session_name, _job_and_service, client)


def pod_group(session_name: str, client: Any | None = None, **_: object) -> ObjectsScheduler:
    """The same, and a PodGroup of which Kubernetes' own scheduler places all pods or none. For TorchX's entry point."""
    return ObjectsScheduler("pod-group", session_name, lambda app: [_pod_group(app), *_job_and_service(app)], client)


def jobset(session_name: str, client: Any | None = None, **_: object) -> ObjectsScheduler:
    """A JobSet, whose controller makes the Service. For TorchX's entry point."""
    return ObjectsScheduler("jobset", session_name, lambda app: [_jobset(app)], client)


def _create(client: Any, namespace: str, made: dict[str, Any]) -> None:
    from kubernetes.client import ApiException, BatchV1Api, CoreV1Api, CustomObjectsApi

    options = {"field_validation": "Strict"}  # what the server does not know is refused, not dropped
    try:
        match made["kind"]:
            case "Service":
                CoreV1Api(client).create_namespaced_service(namespace, made, **options)
            case "Job":
                BatchV1Api(client).create_namespaced_job(namespace, made, **options)
            case kind:
                group, version = made["apiVersion"].split("/")
                plural = f"{kind.lower()}s"
                CustomObjectsApi(client).create_namespaced_custom_object(
                    group, version, namespace, plural, made, **options
                )
    except ApiException as error:
        if error.status != 409 or made["kind"] not in BESIDE_THE_JOB:
            raise


# --- the objects ------------------------------------------------------------------------------------------------------


def metadata(app: AppDef, *, queued: bool = False) -> dict[str, Any]:
    """Of everything that is created. queued: with Kueue's label; its webhook suspends what carries it."""
    pods = Pods.of(app.roles[0])
    queue = {KUEUE: pods.section.queue} if queued and pods.section.queue else {}
    return {
        "name": app.name,
        "namespace": pods.section.namespace,
        "labels": {**pods.labels, **queue},
        "annotations": dict(pods.annotations),
    }


def _job_and_service(app: AppDef) -> list[dict[str, Any]]:
    role = app.roles[0]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(app, queued=True),
        "spec": _job_spec(role, f"{app.name}-$(DINOCTL_NODE).{app.name}", subdomain=app.name),
    }
    return [_service(app), job]


def _service(app: AppDef) -> dict[str, Any]:
    """Headless: it does nothing but give pods names, and those before they are ready, as they meet to get ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(app),
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {NAME: app.name}},
    }


def _pod_group(app: AppDef) -> dict[str, Any]:
    role = app.roles[0]
    return {
        "apiVersion": f"scheduling.k8s.io/{Pods.of(role).section.pod_group_api}",
        "kind": "PodGroup",
        "metadata": metadata(app),
        "spec": {"schedulingPolicy": {"gang": {"minCount": role.num_replicas}}},
    }


def _jobset(app: AppDef) -> dict[str, Any]:
    role, meta = app.roles[0], metadata(app, queued=True)
    inner = {"labels": dict(Pods.of(role).labels), "annotations": dict(Pods.of(role).annotations)}
    spec = _job_spec(role, f"{app.name}-{role.name}-0-$(DINOCTL_NODE).{app.name}")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": meta,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": app.name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": role.name, "replicas": 1, "template": {"metadata": inner, "spec": spec}}],
        },
    }


def _job_spec(role: Role, address: str, *, subdomain: str | None = None) -> dict[str, Any]:
    """One attempt, whatever becomes of it: no pod is made again, and nothing is cleared away before its end is read."""
    identity = Identity(
        node=field(f"metadata.annotations['{JOB_KEY}job-completion-index']"),
        job=field(f"metadata.labels['{JOB_KEY}controller-uid']"),
        address=address,
    )
    pod = template(role, identity)
    if subdomain is not None:
        pod["spec"] = {"subdomain": subdomain, **pod["spec"]}
    return {
        "completionMode": "Indexed",
        "completions": role.num_replicas,
        "parallelism": role.num_replicas,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": pod,
    }


def _failure_rules() -> list[dict[str, Any]]:
    """The first rule that fits ends the Job and is named in its condition, which outlives the pods.

    The agent's code comes first: it says that a preempted pod sealed, too. A disruption is what is left to say of a pod
    whose agent was killed; any other code, 137 of a lack of memory for one, of a pod that nobody disrupted.
    """
    codes = sorted(code for code in EXIT_CODES.values() if code)
    agent = {"containerName": CONTAINER, "operator": "In", "values": codes}
    other = {"containerName": CONTAINER, "operator": "NotIn", "values": [0]}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return [
        {"action": "FailJob", "onExitCodes": agent},
        {"action": "FailJob", "onPodConditions": [disrupted]},
        {"action": "FailJob", "onExitCodes": other},
    ]
