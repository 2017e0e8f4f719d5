"""The `kubernetes` section of a cluster's profile: what the pods are made of, and where."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, field_validator, model_validator

from model.config import Positive, Section

OURS = ("dinoctl/", "batch.kubernetes.io/", "jobset.sigs.k8s.io/", "app.kubernetes.io/managed-by")
"""Beginnings of labels and annotations that dinoctl or Kubernetes sets."""

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")]
"""An amount as Kubernetes writes it: 500m, 4, 64Gi."""

EnvName = Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]


class Toleration(Section):
    """A taint that the pods put up with."""

    key: str | None = Field(None, description="null: every taint")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="null: every effect"
    )


class Volume(Section):
    """Files that the pods see. One of `claim`, `host_path`, `nfs`, `secret` and `config_map` says where they are."""

    path: str = Field(description="where the pods have it; a volume that is `here` has the same path on this machine")
    here: bool = Field(False, description="the same files lie at `path` where dinoctl runs: runs and data may be there")
    read_only: bool = False
    claim: str | None = Field(None, description="a PersistentVolumeClaim of the namespace")
    host_path: str | None = Field(None, description="a folder of each node")
    nfs: str | None = Field(None, description="SERVER:/PATH")
    secret: str | None = None
    config_map: str | None = None

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
    namespace: str = "default"
    scheduler: Literal["indexed-job", "jobset", "volcano"] = Field(
        "indexed-job", description="what an attempt is on the cluster; a plain Job needs nothing installed there"
    )
    queue: str | None = Field(None, description="Kueue's LocalQueue (indexed-job, jobset), or Volcano's queue")
    priority_class: str | None = None

    image: str = Field(description="worker image, by digest (NAME@sha256:...), as the code comes with it")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pull_secrets: list[str] = Field([], description="Secrets of the namespace with which the image may be pulled")
    python: str = Field("python3", description="command that starts Python in the image")

    gpus: bool = Field(True, description="ask for a GPU a process; false: for CPUs alone")
    gpu_resource: str = "nvidia.com/gpu"
    cpus: Quantity | None = Field(None, description="CPUs of a pod; null: its processes' threads and loader workers")
    memory: Quantity | None = Field(None, description="memory of a pod, request and limit; null: no bound")
    extra_resources: dict[str, str] = Field({}, description="per pod, e.g. rdma/hca: '1'")
    shm_size: Quantity = Field("64Gi", description="of /dev/shm, which counts as the pod's memory")

    node_selector: dict[str, str] = Field({}, description="labels of the nodes to use")
    tolerations: list[Toleration] = Field([], description="taints of nodes to put up with")
    together: str | None = Field(
        None, description="label of nodes (rack, block, zone) of which all pods of an attempt need the same value"
    )
    exclude: list[str] = Field([], description="nodes never to use")
    exclude_hours: Positive = Field(24.0, description="how long a node that failed a run is left out by that run")

    service_account: str | None = Field(None, description="of the pods; they get no token of it")
    host_network: bool = Field(False, description="the nodes' own network, as some RDMA set-ups want it")
    run_as_user: NonNegativeInt | None = Field(1000, description="user of the pods; 0 is root; null: the image's")
    capabilities: list[str] = Field(
        [], description="what root may do after all, e.g. IPC_LOCK for RDMA; no other user gets any"
    )
    read_only_root: bool = Field(True, description="only volumes, /tmp and /dev/shm can be written to")
    volumes: dict[str, Volume] = Field({}, description="by name")
    env: dict[EnvName, str] = Field({}, description="plain values; nothing secret")
    secret_env: dict[EnvName, str] = Field({}, description="by reference: SECRET/KEY")
    env_from_secrets: list[str] = Field([], description="Secrets all of whose keys become variables")
    labels: dict[str, str] = Field({}, description="further labels of the pods and of what makes them")
    annotations: dict[str, str] = Field({}, description="further annotations of both")

    grace_seconds: PositiveInt = Field(120, description="between SIGTERM and SIGKILL")
    gang_seconds: Positive = Field(
        180.0, description="an attempt that has had some of its pods, but not all, for so long gives them back"
    )
    poll_seconds: Positive = Field(5.0, description="the API server is asked at most this often by a process")

    @field_validator("labels", "annotations")
    @classmethod
    def _not_ours(cls, names: dict[str, str]) -> dict[str, str]:
        if taken := [name for name in names if name.startswith(OURS)]:
            raise ValueError(f"{taken[0]} is set by dinoctl or by Kubernetes")
        return names

    @field_validator("secret_env")
    @classmethod
    def _references(cls, references: dict[str, str]) -> dict[str, str]:
        for name, reference in references.items():
            if not re.fullmatch("[^/]+/[^/]+", reference):
                raise ValueError(f"{name}: a Secret's name and its key, as SECRET/KEY; never the secret itself")
        return references
