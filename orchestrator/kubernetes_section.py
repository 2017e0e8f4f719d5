"""The `kubernetes` section of a cluster's profile: what the pods are made of, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from model.config import Positive, Section

OURS = ("dinoctl/", "batch.kubernetes.io/", "jobset.sigs.k8s.io/", "app.kubernetes.io/managed-by")
"""Beginnings of labels and annotations that dinoctl or Kubernetes sets."""

OUR_ENV = ("DINOCTL_NODE", "DINOCTL_NODES", "DINOCTL_ADDRESS", "DINOCTL_JOB", "DINOCTL_HOST")
"""Variables that tell an agent which pod it is."""


def _written(words: str, pattern: str, longest: int = 253) -> AfterValidator:
    """Text of that form, which the API server asks for when it is too late."""

    def check(text: str) -> str:
        if len(text) > longest or not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {words}")
        return text

    return AfterValidator(check)


_DNS = "[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
_WORD = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"

Name = Annotated[str, _written("a name on Kubernetes (a-z, 0-9, - and . inside)", _DNS)]
Label = Annotated[str, _written("a name of at most 63 of a-z, 0-9 and - inside", "[a-z0-9]([a-z0-9-]*[a-z0-9])?", 63)]
LabelKey = Annotated[str, _written("a label's name, as rack or example.org/rack", f"({_DNS}/)?{_WORD}", 317)]
Quantity = Annotated[
    str, _written("an amount, as 500m, 4 or 64Gi", r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
]


class Toleration(Section):
    """A taint that the pods put up with."""

    key: LabelKey | None = Field(None, description="null: every taint")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="null: every effect"
    )

    @model_validator(mode="after")
    def _as_kubernetes_allows(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a value is for operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator: Equal is for a key")
        return self


class Volume(Section):
    """Files that the pods see. One of `claim`, `host_path`, `nfs`, `secret` and `config_map` says where they are."""

    path: str = Field(description="where the pods have it; a volume that is `here` has the same path on this machine")
    here: bool = Field(False, description="the same files lie at `path` where dinoctl runs: runs and data may be there")
    read_only: bool = False
    claim: Name | None = Field(None, description="a PersistentVolumeClaim of the namespace")
    host_path: str | None = Field(None, description="a folder of each node")
    nfs: str | None = Field(None, description="SERVER:/PATH")
    secret: Name | None = None
    config_map: Name | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        named = [name for name in ("claim", "host_path", "nfs", "secret", "config_map") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"one of claim, host_path, nfs, secret and config_map, and not {len(named)}")
        if not self.path.startswith("/") or (self.nfs is not None and ":/" not in self.nfs):
            raise ValueError("path begins with /, and nfs is SERVER:/PATH")
        return self


class Kubernetes(Section):
    """What the pods of an attempt are: one a node. A job overrides any of it under `resources.kubernetes`, for all
    phases or for one."""

    context: str | None = Field(None, description="of the kubeconfig; null: its current one, or the cluster around us")
    namespace: Label = "default"
    scheduler: Literal["indexed-job", "pod-group", "jobset", "volcano"] = Field(
        "indexed-job", description="what an attempt is on the cluster; a plain Job needs nothing installed there"
    )
    pod_group_api: Literal["v1alpha2", "v1beta1"] = Field(
        "v1alpha2", description="of scheduling.k8s.io, for scheduler: pod-group; v1beta1 from Kubernetes 1.37"
    )
    queue: Name | None = Field(None, description="Kueue's LocalQueue, or Volcano's queue")
    priority_class: Name | None = None

    image: Annotated[str, _written("an image", r"\S+")] = Field(
        description="worker image, by digest (NAME@sha256:...), as the code comes with it"
    )
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pull_secrets: list[Name] = Field([], description="Secrets of the namespace with which the image may be pulled")
    python: str = Field("python3", description="command that starts Python in the image")

    gpus: bool = Field(True, description="ask for a GPU a process; false: for CPUs alone")
    gpu_resource: LabelKey = "nvidia.com/gpu"
    cpus: Quantity | None = Field(None, description="CPUs of a pod; null: its processes' threads and loader workers")
    memory: Quantity | None = Field(None, description="memory of a pod, request and limit; null: no bound")
    extra_resources: dict[str, Quantity] = Field({}, description="per pod, e.g. rdma/hca: '1'")
    shm_size: Quantity = Field("64Gi", description="of /dev/shm, which counts as the pod's memory")

    node_selector: dict[str, str] = Field({}, description="labels of the nodes to use")
    tolerations: list[Toleration] = Field([], description="taints of nodes to put up with")
    together: LabelKey | None = Field(
        None, description="label of nodes (rack, block, zone) of which all pods of an attempt need the same value"
    )
    exclude: list[Name] = Field([], description="nodes never to use")
    exclude_hours: Positive = Field(24.0, description="how long a node that failed a run is left out by that run")

    service_account: Name | None = Field(None, description="of the pods; they get no token of it")
    host_network: bool = Field(False, description="the nodes' own network, as some RDMA set-ups want it")
    run_as_user: NonNegativeInt | None = Field(1000, description="user of the pods; 0 is root; null: the image's")
    capabilities: list[str] = Field(
        [], description="what root may do after all, e.g. IPC_LOCK for RDMA; no other user gets any"
    )
    read_only_root: bool = Field(True, description="only volumes, /tmp and /dev/shm can be written to")
    volumes: dict[str, Volume] = Field({}, description="by name")
    env: dict[str, str] = Field({}, description="plain values; nothing secret")
    secret_env: dict[str, str] = Field({}, description="by reference: SECRET/KEY")
    env_from_secrets: list[Name] = Field([], description="Secrets all of whose keys become variables")
    labels: dict[str, str] = Field({}, description="further labels of the pods and of what makes them")
    annotations: dict[str, str] = Field({}, description="further annotations of both")

    grace_seconds: PositiveInt = Field(120, description="between SIGTERM and SIGKILL")
    gang_seconds: Positive = Field(
        180.0,
        le=240,
        description="an attempt that has had some of its pods, but not all, for so long gives them back; agents wait "
        "300 s for one another",
    )
    lost_seconds: Positive = Field(
        60.0, description="an attempt of which a node is not heard of is given up once no step was recorded for so long"
    )
    poll_seconds: Positive = Field(5.0, description="the API server is asked at most this often by a process")

    @field_validator("labels", "annotations")
    @classmethod
    def _not_ours(cls, names: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in names if name.startswith(OURS)]:
            raise ValueError(f"{taken[0]} is set by dinoctl or by Kubernetes")
        return names

    @field_validator("labels", "annotations", "node_selector", "extra_resources")
    @classmethod
    def _keys(cls, names: dict[str, str]) -> dict[str, str]:
        _all(names, f"({_DNS}/)?{_WORD}", "a name, as rack or example.org/rack")
        return names

    @field_validator("labels", "node_selector")
    @classmethod
    def _values(cls, names: dict[str, str]) -> dict[str, str]:
        _all(names.values(), f"({_WORD})?", "a label's value: at most 63 letters, digits, -, _ and .")
        return names

    @field_validator("env", "secret_env")
    @classmethod
    def _variables(cls, names: dict[str, str]) -> dict[str, str]:
        _all(names, "[A-Za-z_][A-Za-z0-9_]*", "a variable's name")
        if taken := [name for name in names if name in OUR_ENV]:
            raise ValueError(f"{taken[0]} is set by dinoctl")
        return names

    @field_validator("secret_env")
    @classmethod
    def _references(cls, references: dict[str, str]) -> dict[str, str]:
        for name, reference in references.items():
            if not re.fullmatch(f"{_DNS}/[A-Za-z0-9._-]+", reference):
                raise ValueError(f"{name}: a Secret's name and its key, as SECRET/KEY; never the secret itself")
        return references

    @field_validator("volumes")
    @classmethod
    def _places(cls, volumes: dict[str, Volume]) -> dict[str, Volume]:
        _all(volumes, "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a volume's name: at most 63 of a-z, 0-9 and - inside")
        paths = [volume.path.rstrip("/") for volume in volumes.values()]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"two volumes at {twice[0] or '/'}")
        return volumes

    @model_validator(mode="after")
    def _once(self) -> Kubernetes:
        if both := [name for name in self.env if name in self.secret_env]:
            raise ValueError(f"{both[0]} is in env and in secret_env")
        if self.capabilities and self.run_as_user not in (0, None):
            raise ValueError("capabilities are for run_as_user: 0, as Kubernetes gives other users none")
        return self


def _all(texts: Iterable[str], pattern: str, words: str) -> None:
    for text in texts:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {words}")
