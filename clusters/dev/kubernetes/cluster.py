"""A real Kubernetes on this machine, as root, without systemd: for `up` and `down`, and for the tests.

    etcd <- kube-apiserver <- kube-controller-manager, kube-scheduler
                           <- jobset      (the JobSet controller, with its webhooks)
                           <- kwok        (fake nodes gpu-000, ...: it plays their pods too)
                           <- coredns     (names of the cluster, for the pods of real nodes)
                           <- kubelet <-> containerd, runc      (real nodes real-0, ...)

Everything lies in one folder: certificates, database, logs, and the nodes' own files. Ports, bridge and cgroups are the
cluster's own too, so several stand beside each other.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clusters.dev import ports, processes
from clusters.dev.kubernetes import addons, build, image, node, settings
from clusters.dev.kubernetes.api import Api, ApiError
from clusters.dev.kubernetes.certificates import Authority
from clusters.dev.kubernetes.node import GPU, REAL, WHOLE_NODE, Node
from clusters.dev.kubernetes.settings import PARTS, Settings

PROGRAMS = ("containerd", "ctr", "runc", "ip", "openssl", "unshare", "nsenter", "mount")
LONGEST_FOLDER = 67
"""A Unix socket's path has room for 107 characters; a kubelet's longest is real-0/kubelet/pod-resources/1234567890."""

PATIENCE = 120.0
"""Seconds for anything that takes a few on a quiet machine."""

CLASSES = {"low": 10, "high": 1000}
"""The priority classes."""


class ClusterError(Exception):
    """The cluster cannot be brought up, or does not do what it was told; says what to do about it."""


def lacking() -> str:
    """What this machine lacks for a cluster and what to do about it; "" where one can be brought up."""
    if os.getuid() != 0:
        return "root is needed: run it as root"
    if build.missing():
        return build.lacks_go() or "not built: clusters/dev/kubernetes/install, as root, builds and installs it"
    missing = [program for program in PROGRAMS if shutil.which(program, path=processes.PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; clusters/dev/kubernetes/install, as root, installs it"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        return "root may not give a process mounts of its own here: a container needs --privileged"
    return ""


@dataclass
class Cluster:
    """The cluster in `folder`, up or down."""

    folder: Path
    settings: Settings

    @classmethod
    def found(cls, folder: Path) -> Cluster:
        """The one that `up` left in `folder`. Raises ClusterError if there is none."""
        try:
            return cls(folder, settings.read(folder))
        except OSError:
            raise ClusterError(f"{folder}: no cluster was brought up there") from None

    # --- up and down --------------------------------------------------------------------------------------------------

    def up(self, *, real_nodes: bool = True) -> None:
        """Start everything and wait until it is ready. real_nodes: also those; else `start_real_nodes` does."""
        self._refuse()
        try:
            self._start_control_plane()
            self._start_addons()
            if real_nodes:
                self.start_real_nodes()
        except BaseException:
            self.down()
            raise

    def start_real_nodes(self) -> None:
        """The real nodes, and the DNS of their pods. What runs already is left alone."""
        node.make_bridge(self.settings)
        if not self._runs("coredns"):
            self._start("coredns", addons.coredns(self.folder, self.settings, self.authority))
        self._start_nodes(self._nodes())
        self.wait(lambda: addons.listens(self.settings.gateway, 53), "CoreDNS to listen", "coredns")

    def down(self) -> None:
        """End every process of the cluster, its pods included, and remove what it made: nothing of it stays."""
        processes.end(self.folder)
        for real in self._nodes():
            real.clear()
        node.remove_shared(self.settings)
        shutil.rmtree(self.folder)

    def _refuse(self) -> None:
        if lack := lacking():
            raise ClusterError(f"no Kubernetes can be brought up here: {lack}")
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ClusterError(
                f"{self.folder}: longer than {LONGEST_FOLDER} characters, as paths of sockets must be short"
            )
        if self.settings.nodes > settings.MOST_NODES:
            raise ClusterError(f"{self.settings.nodes} real nodes: at most {settings.MOST_NODES} have addresses")
        if processes.find(self.folder):
            raise ClusterError(f"{self.folder}: a cluster is up there; take it down first")
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        settings.write(self.settings, self.folder)

    # --- its control plane --------------------------------------------------------------------------------------------

    @functools.cached_property
    def authority(self) -> Authority:
        return Authority(self.folder, self.settings.server)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.authority.kubeconfig("admin", "/O=system:masters/CN=admin")

    @functools.cached_property
    def api(self) -> Api:
        certificate, key = self.authority.issue("admin", "/O=system:masters/CN=admin")
        return Api(self.settings.port, self.authority.ca, certificate, key)

    def _start_control_plane(self) -> None:
        self.authority.make()
        self._start("etcd", addons.etcd(self.folder, self.settings))
        self.start_apiserver()
        for part in ("controllers", "scheduler"):
            self._start(part, getattr(addons, part)(self.settings, self.authority))
        default = "/api/v1/namespaces/default/serviceaccounts/default"
        self.wait(lambda: self._has(default), "the controller-manager to work", "controllers")
        for name, value in CLASSES.items():
            path = f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}"
            kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
            self.api.apply(path, {**kind, "metadata": {"name": name}, "value": value})

    def start_apiserver(self) -> None:
        self._start("apiserver", addons.apiserver(self.settings, self.authority))
        self.wait(self.api.ready, "the API server to be ready", "apiserver")

    def stop_apiserver(self) -> None:
        """At once, as in a crash: with watches open its graceful end takes a minute."""
        processes.end(self.folder, "apiserver")
        port = self.settings.port  # its threads may outlive it by a moment, and hold the port
        self.wait(lambda: ports.free(1, port) == port, "the API server's port to be free")

    def restart_apiserver(self) -> None:
        self.stop_apiserver()
        self.start_apiserver()

    def _start_addons(self) -> None:
        jobset = addons.jobset(self.folder, self.settings, self.authority, self.api)
        self.wait(lambda: self._has("/apis/jobset.x-k8s.io/v1alpha2"), "JobSet's definition to be served")
        self._start("jobset", jobset)
        for name in self.settings.fake_names:
            self._make_fake(name)
        self._start("kwok", addons.kwok(self.folder, self.settings, self.authority))
        self.wait(lambda: addons.is_well(self.settings, "jobset", "/readyz"), "JobSet to be ready", "jobset")
        addons.make_webhooks(self.settings, self.authority, self.api)
        self.wait(lambda: self._are_ready(self.settings.fake_names), "the fake nodes to be ready", "kwok")

    # --- its nodes ----------------------------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """As a power cut would: kubelet, containerd and its pods' processes at once. The cluster finds out after
        `node_grace` seconds. A fake node falls silent for good: `start_node` makes it anew."""
        if name in self.settings.fake_names:
            taken = {"holderIdentity": "nobody", "leaseDurationSeconds": 86400}
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.api.merge(addons.LEASES + name, {"spec": {**taken, "renewTime": now}})
            return
        processes.end(self.folder, self._real(name).name)

    def start_node(self, name: str) -> None:
        """Bring back a node that was killed, as a boot would, and wait until it is ready."""
        if name in self.settings.fake_names:
            self._remove_pods(name)
            self.api.delete(f"/api/v1/nodes/{name}")
            self.api.delete(addons.LEASES + name)
            self._make_fake(name)
            self.wait(lambda: self._are_ready([name]), f"{name} to be ready", "kwok")
            return
        self._start_nodes([self._real(name)])

    def _start_nodes(self, nodes: Iterable[Node]) -> None:
        starting = [real for real in nodes if not self._runs(real.name)]
        beats = {real.name: self._heartbeat(real.name) for real in starting}
        for act in (Node.start_containerd, Node.start_kubelet):
            for real in starting:
                self._try(real.name, functools.partial(act, real))
            if act is Node.start_containerd:
                self.wait(lambda: all(real.has_containerd() for real in starting), "containerd to answer", "real-")
        for real in starting:
            fresh = functools.partial(self._is_back, real.name, beats[real.name])
            self.wait(fresh, f"{real.name} to be ready", real.name)
            amounts = {GPU: str(self.settings.gpus), WHOLE_NODE: "1"}  # after: a kubelet that registers sets them to 0
            self.api.merge(
                f"/api/v1/nodes/{real.name}/status", {"status": {"capacity": amounts, "allocatable": amounts}}
            )

    def node_is_ready(self, name: str) -> bool:
        return self._are_ready([name])

    def _are_ready(self, names: Iterable[str]) -> bool:
        """And free of the taints of a node that is not: they go a moment later."""
        found = {each["metadata"]["name"]: each for each in self.api.items("/api/v1/nodes")}
        return all(
            _ready(found.get(name, {})).get("status") == "True" and not _is_shunned(found[name]) for name in names
        )

    def _heartbeat(self, name: str) -> str:
        """When it last said that it is well; "" before it ever did."""
        found = [each for each in self.api.items("/api/v1/nodes") if each["metadata"]["name"] == name]
        return str(_ready(found[0]).get("lastHeartbeatTime", "")) if found else ""

    def _is_back(self, name: str, before: str) -> bool:
        return self._heartbeat(name) != before and self._are_ready([name])

    def _make_fake(self, name: str) -> None:
        self.api.apply(f"/api/v1/nodes/{name}", addons.fake_node(name, self.settings.gpus))

    def _remove_pods(self, name: str) -> None:
        for pod in self.api.items(f"/api/v1/pods?fieldSelector=spec.nodeName={name}"):
            self.remove_pod(pod)

    def remove_pod(self, pod: dict[str, Any], *, grace: int = 0) -> None:
        """grace: seconds that its processes are given; 0: it is gone at once, whether its node answers or not."""
        meta = pod["metadata"]
        self.api.delete(f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", grace=grace)

    def _nodes(self) -> list[Node]:
        return [Node(self.folder, self.settings, self.authority, number) for number in range(self.settings.nodes)]

    def _real(self, name: str) -> Node:
        for real in self._nodes():
            if real.name == name:
                return real
        there = ", ".join([*self.settings.node_names, *self.settings.fake_names])
        raise ClusterError(f"{name}: no such node; there are {there}")

    # --- talking to it ------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What clients need to reach this cluster and no other."""
        return {"KUBECONFIG": str(self.kubeconfig)}

    def kubectl(self, *words: str) -> str:
        """What it prints. Raises ClusterError if it fails."""
        command = [str(build.built() / "bin" / "kubectl"), *words]
        done = subprocess.run(
            command, env={**os.environ, **self.environment()}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        if done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def preempt(self, name: str, namespace: str) -> str:
        """A pod of priority class `high` that needs all of that node: its pods have to go. Returns the pod's name;
        `release` ends it."""
        amounts = {GPU: str(self.settings.gpus)} | ({WHOLE_NODE: "1"} if name in self.settings.node_names else {})
        pod = f"bully-{name}-{time.monotonic_ns():x}"
        container = {"name": "bully", "image": image.PAUSE, "imagePullPolicy": "Never"}
        self.api.create(f"/api/v1/namespaces/{namespace}/pods", {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod},
            "spec": {
                "priorityClassName": "high", "nodeSelector": {"kubernetes.io/hostname": name},
                "tolerations": [{"key": GPU, "operator": "Exists"}], "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "containers": [{**container, "resources": {"limits": amounts}}],
            },
        })  # fmt: skip
        return pod

    def release(self, pod: str, namespace: str) -> None:
        """Give back what `preempt` took."""
        self.api.delete(f"/api/v1/namespaces/{namespace}/pods/{pod}")

    def wait(self, true: Callable[[], bool], what: str, part: str = "", seconds: float = PATIENCE) -> None:
        """Raises ClusterError, with the ends of the logs, if it does not come true in time, or if the daemon `part`
        has ended before. No answer is not true yet."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError, ApiError):
                if true():
                    return
            ended = part in PARTS and not self._runs(part)
            if ended or time.monotonic() > deadline:
                logs = [f"--- {log}\n{processes.tail(log)}" for log in sorted((self.folder / "log").glob(f"{part}*"))]
                why = f"{part} has ended" if ended else f"not within {seconds:g} s"
                raise ClusterError("\n".join([f"{why}: {what}", *logs]))
            time.sleep(0.1)

    def _has(self, path: str) -> bool:
        return bool(self.api.get(path))

    def _runs(self, part: str) -> bool:
        return bool(processes.find(self.folder, part))

    def _start(self, part: str, command: list[str]) -> None:
        """A daemon of the control plane. On a machine that others keep busy the fake nodes' leases would run out."""
        own, first = f"{self.folder}/{part}.kubeconfig", ("setsid", "--fork", *processes.PREFERRED)
        self._try(part, lambda: processes.start(self.folder, part, [*first, *command], KUBECONFIG=own))

    def _try(self, part: str, start: Callable[[], None]) -> None:
        try:
            start()
        except (RuntimeError, StopIteration) as error:
            raise ClusterError(f"{part}: {error}") from None


def _ready(found: dict[str, Any]) -> dict[str, Any]:
    """The Ready condition of a node."""
    conditions = found.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == "Ready"), {})


def _is_shunned(found: dict[str, Any]) -> bool:
    """Whether no pod is placed there as the node was not heard of."""
    taints = found["spec"].get("taints", [])
    return any(taint["key"] in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable") for taint in taints)


__all__ = ["REAL", "WHOLE_NODE", "Cluster", "ClusterError", "Settings", "lacking"]
