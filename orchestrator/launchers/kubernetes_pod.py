"""The pod of one node, as a plain mapping: one function for Jobs, JobSets and Volcano's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchx.specs import Role

from orchestrator.kubernetes_section import Kubernetes, Toleration, Volume
from orchestrator.launchers.kubernetes_records import CONTAINER, NAME

NODE_NAME = "kubernetes.io/hostname"
SHM, TMP = "/dev/shm", "/tmp"


@dataclass(frozen=True)
class Pods:
    """What an attempt's pods are beside what TorchX has a field for: `role.metadata["pods"]`.

    exclude: names of nodes. seconds: from its start on a node until a pod is asked to stop; None: no limit.
    """

    section: Kubernetes
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    exclude: tuple[str, ...]
    seconds: int | None

    @staticmethod
    def of(role: Role) -> Pods:
        pods = role.metadata["pods"]
        assert isinstance(pods, Pods)
        return pods


@dataclass(frozen=True)
class Identity:
    """How a pod learns which one it is: where its number and its job's name come from (`value` or `valueFrom` of a
    variable), and its name among the pods, in which $(DINOCTL_NODE) is its number."""

    node: Mapping[str, Any]
    job: Mapping[str, Any]
    address: str


def field(path: str) -> dict[str, Any]:
    """The source of a variable that a pod reads from itself."""
    return {"valueFrom": {"fieldRef": {"fieldPath": path}}}


def template(role: Role, identity: Identity) -> dict[str, Any]:
    """metadata and spec of each pod of `role`."""
    pods = Pods.of(role)
    section = pods.section
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": section.grace_seconds,
        # The pod's, not the Job's: a Job's clock runs from its creation, through all the days in a queue.
        "activeDeadlineSeconds": pods.seconds,
        "priorityClassName": section.priority_class,
        "serviceAccountName": section.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "schedulingGroup": {"podGroupName": pods.labels[NAME]} if section.scheduler == "pod-group" else None,
        "hostNetwork": section.host_network or None,
        "dnsPolicy": "ClusterFirstWithHostNet" if section.host_network else None,
        "imagePullSecrets": [{"name": name} for name in section.pull_secrets],
        "nodeSelector": dict(section.node_selector),
        "tolerations": [_toleration(toleration) for toleration in section.tolerations],
        "affinity": _affinity(role, pods),
        "securityContext": _user(section),
        "containers": [_container(role, section, identity)],
        "volumes": list(_volumes(section)),
    }
    return {"metadata": {"labels": dict(pods.labels), "annotations": dict(pods.annotations)}, "spec": _said(spec)}


def _said(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None or empty."""
    return {name: value for name, value in fields.items() if value is not None and value != [] and value != {}}


def _container(role: Role, section: Kubernetes, identity: Identity) -> dict[str, Any]:
    # Kubernetes takes $(NAME) in a command for a variable, and $$ for $.
    command = [word.replace("$", "$$") for word in (role.entrypoint, *role.args)]
    return _said(
        {
            "name": CONTAINER,
            "image": role.image,
            "imagePullPolicy": section.pull_policy,
            "command": command,
            "env": _variables(role, section, identity),
            "envFrom": [{"secretRef": {"name": name}} for name in section.env_from_secrets],
            "resources": _resources(role, section),
            "securityContext": _rights(section),
            "terminationMessagePolicy": "FallbackToLogsOnError",  # its last words stay in the pod's status
            "volumeMounts": list(_mounts(section)),
        }
    )


def _variables(role: Role, section: Kubernetes, identity: Identity) -> list[dict[str, Any]]:
    """The contract with `model.nodes` first: Kubernetes fills in $(NAME) only from variables before it."""
    ours = {
        "DINOCTL_NODE": identity.node,
        "DINOCTL_NODES": {"value": str(role.num_replicas)},
        "DINOCTL_ADDRESS": field("status.podIP") if section.host_network else {"value": identity.address},
        "DINOCTL_JOB": identity.job,
        "DINOCTL_HOST": field("spec.nodeName"),
    }
    plain = {name: {"value": value} for name, value in role.env.items()}
    secret = {
        name: {"valueFrom": {"secretKeyRef": dict(zip(("name", "key"), reference.split("/"), strict=True))}}
        for name, reference in section.secret_env.items()
    }
    return [{"name": name, **source} for name, source in {**ours, **plain, **secret}.items()]


def _resources(role: Role, section: Kubernetes) -> dict[str, Any]:
    """CPUs are asked for and not bounded: a loader that is throttled starves its GPU. All else is both."""
    both = _said({"memory": section.memory, **section.extra_resources})
    if role.resource.gpu > 0:
        both[section.gpu_resource] = str(role.resource.gpu)
    return _said({"requests": {"cpu": section.cpus or f"{role.resource.cpu:g}", **both}, "limits": both})


# --- where ------------------------------------------------------------------------------------------------------------


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return _said(toleration.model_dump(mode="json"))


def _affinity(role: Role, pods: Pods) -> dict[str, Any]:
    """Not on excluded nodes; of several pods no two on one node, and all where `together` is the same."""
    affinity = {}
    if pods.exclude:
        # By name, as a node's label of its host name may be another; one name a requirement is all that fields take.
        names = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in pods.exclude]
        terms = {"nodeSelectorTerms": [{"matchFields": names}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    if role.num_replicas > 1:
        if pods.section.together:
            affinity["podAffinity"] = _beside(pods, pods.section.together)
        affinity["podAntiAffinity"] = _beside(pods, NODE_NAME)
    return affinity


def _beside(pods: Pods, label: str) -> dict[str, Any]:
    mine = {"matchLabels": {NAME: pods.labels[NAME]}}
    return {"requiredDuringSchedulingIgnoredDuringExecution": [{"labelSelector": mine, "topologyKey": label}]}


# --- as whom ----------------------------------------------------------------------------------------------------------


def _user(section: Kubernetes) -> dict[str, Any]:
    user = section.run_as_user
    context: dict[str, Any] = {"seccompProfile": {"type": "RuntimeDefault"}}
    if user is not None:
        context |= {"runAsNonRoot": user != 0, "runAsUser": user, "runAsGroup": user, "fsGroup": user}
        context["fsGroupChangePolicy"] = "OnRootMismatch"  # else every start walks through a volume's every file
    return context


def _rights(section: Kubernetes) -> dict[str, Any]:
    """No IPC_LOCK for RDMA by itself: Kubernetes gives a user other than root no capability, whatever is added, and the
    node's own bound on locked memory counts."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": section.read_only_root,
        "capabilities": _said({"drop": ["ALL"], "add": list(section.capabilities)}),
    }


# --- files ------------------------------------------------------------------------------------------------------------


def _volumes(section: Kubernetes) -> Iterator[dict[str, Any]]:
    own = _own(section)
    if SHM in own:
        yield {"name": own[SHM], "emptyDir": {"medium": "Memory", "sizeLimit": section.shm_size}}
    if TMP in own:
        yield {"name": own[TMP], "emptyDir": {}}
    for name, volume in section.volumes.items():
        yield {"name": name, **_source(volume)}


def _mounts(section: Kubernetes) -> Iterator[dict[str, Any]]:
    for path, name in _own(section).items():
        yield {"name": name, "mountPath": path}
    for name, volume in section.volumes.items():
        yield _said({"name": name, "mountPath": volume.path, "readOnly": volume.read_only or None})


def _own(section: Kubernetes) -> dict[str, str]:
    """Where files may be written whatever the image is, unless the profile has another volume there."""
    theirs = {volume.path.rstrip("/") for volume in section.volumes.values()}
    return {path: name for path, name in ((SHM, "dinoctl-shm"), (TMP, "dinoctl-tmp")) if path not in theirs}


def _source(volume: Volume) -> dict[str, Any]:
    if volume.claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.host_path is not None:  # one that is not there would be made, empty, on the node's own disk
        return {"hostPath": {"path": volume.host_path, "type": "Directory"}}
    if volume.nfs is not None:
        server, _, path = volume.nfs.partition(":")
        return {"nfs": {"server": server, "path": path}}
    if volume.secret is not None:
        return {"secret": {"secretName": volume.secret}}
    return {"configMap": {"name": volume.config_map}}
