"""A real Kubernetes for tests: what clusters/dev/kubernetes/up brings up, or another one that a kubeconfig names.

with running(folder) as cluster: ...       control plane, JobSet and 32 fake nodes; ended, pods included, at the end
cluster.start_real_nodes()                 two nodes whose pods run; for the first test that wants them

A test takes the fixture `kubernetes` (or `real_nodes`): a `Place`, a namespace of its own on the session's cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clusters.dev.kubernetes import build, profile
from clusters.dev.kubernetes.cluster import PATIENCE, REAL, Cluster, ClusterError, Settings, lacking
from clusters.dev.kubernetes.node import GPU
from clusters.dev.kubernetes.settings import free_net, free_port
from tests.guarded import guarded

FAKE = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
"""The label of the fake nodes."""

__all__ = ["FAKE", "GPU", "REAL", "Cluster", "ClusterError", "Place", "Settings", "lacking", "place", "running"]


@contextmanager
def running(folder: Path, *, nodes: int = 2, real_nodes: bool = False, **chosen: Any) -> Iterator[Cluster]:
    """A cluster in `folder`, on free ports and a free network. chosen: other fields of Settings."""
    cluster = Cluster(folder, Settings(port=free_port(nodes), net=free_net(), nodes=nodes, **chosen))
    with guarded("kubernetes", folder):
        cluster.up(real_nodes=real_nodes)
        try:
            yield cluster
        finally:
            cluster.down()


@dataclass
class Place:
    """A namespace of one test's own, and what the test may do to the cluster around it. All of it is undone."""

    kubeconfig: Path
    namespace: str
    cluster: Cluster | None
    """None: DINOCTL_TEST_KUBECONFIG names one that is not ours to break."""
    killed: set[str] = field(default_factory=set)

    @property
    def ours(self) -> Cluster:
        """The dev cluster itself. A test that asks for it is left out on another one."""
        if self.cluster is None:
            pytest.skip("the cluster of DINOCTL_TEST_KUBECONFIG is not ours to break")
        return self.cluster

    def kubectl(self, *words: str) -> str:
        """What it prints, asked in this namespace. Raises ClusterError if it fails."""
        where = (f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}")
        done = subprocess.run(
            ["kubectl" if self.cluster is None else build.built() / "bin" / "kubectl", *where, *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        if done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def create(self, manifest: dict[str, Any]) -> None:
        """Create an object in this namespace."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(manifest, file)
            file.flush()
            self.kubectl("create", "-f", file.name)

    def get(self, *words: str) -> dict[str, Any]:
        """What `kubectl get` says: an object, or a list with `items`."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *words, "-o", "json"))
        return found

    def pod_section(self, *folders: Path, **changes: Any) -> dict[str, Any]:
        """The `kubernetes` section of a profile whose pods run this checkout's Python and code on the real nodes, one a
        node. folders: what they may write to, at the same path as here; nothing else is shared, /tmp is a pod's own.
        The pods' user is who makes these folders: another, as a profile mostly has it, could read but not write."""
        assert self.ours
        told = profile.section(*folders, namespace=self.namespace, python=Path(sys.executable), owner=os.getuid())
        return told | changes

    def fake_section(self, **changes: Any) -> dict[str, Any]:
        """The same for fake nodes: nothing runs in their pods."""
        assert self.ours
        told = {
            "namespace": self.namespace, "image": "registry.invalid/worker:1", "node_selector": FAKE, "cpus": "1",
            "tolerations": [{"key": GPU}], "gang_seconds": 60, "lost_seconds": 2, "poll_seconds": 1,
        }  # fmt: skip
        return told | changes

    # --- what becomes of the cluster ----------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """As a power cut would: real-0, ...; a fake one (gpu-000, ...) falls silent."""
        self.killed.add(name)
        self.ours.kill_node(name)

    def start_node(self, name: str) -> None:
        self.ours.start_node(name)
        self.killed.discard(name)

    def stop_apiserver(self) -> None:
        self.ours.stop_apiserver()

    def start_apiserver(self) -> None:
        self.ours.start_apiserver()

    def restart_apiserver(self) -> None:
        self.ours.restart_apiserver()

    def preempt(self, *nodes: str) -> list[str]:
        """A pod of priority class `high` on each of the nodes, which needs all of it: their pods have to go. Returns
        the pods' names, for `release`."""
        return [self.ours.preempt(node, self.namespace) for node in nodes]

    def release(self, *pods: str) -> None:
        for pod in pods:
            self.ours.release(pod, self.namespace)

    def wait(self, true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Raises ClusterError if it does not come true in time."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise ClusterError(f"not within {seconds:g} s: {what}")
            time.sleep(0.2)

    # --- its beginning and its end ------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Everything answers again, and neither the namespace's pods nor the rest of it are there."""
        if self.cluster is None:
            self.kubectl("delete", "namespace", self.namespace, "--wait=false")
            return
        if not self.cluster.api.ready():
            self.cluster.restart_apiserver()
        self.cluster.api.delete(f"/api/v1/namespaces/{self.namespace}")
        for name in sorted(self.killed):
            self.start_node(name)
        self.cluster.wait(self._end_pods, f"the pods of {self.namespace} to end")

    def _end_pods(self) -> bool:
        """Whether there is none any more."""
        assert self.cluster is not None
        pods = self.cluster.api.items(f"/api/v1/namespaces/{self.namespace}/pods")
        for pod in pods:
            real = str(pod["spec"].get("nodeName", "")).startswith("real-")
            self.cluster.remove_pod(pod, grace=1 if real else 0)  # a kubelet ends what runs in it first
        return not pods


@contextmanager
def place(kubeconfig: Path, cluster: Cluster | None) -> Iterator[Place]:
    """One with a namespace that is new."""
    new = Place(kubeconfig, f"test-{uuid.uuid4().hex[:8]}", cluster)
    new.kubectl("create", "namespace", new.namespace)
    if cluster is not None:  # no pod is let in before its service account is there
        account = f"/api/v1/namespaces/{new.namespace}/serviceaccounts/default"
        cluster.wait(lambda: bool(cluster.api.get(account)), "the namespace's service account")
    try:
        yield new
    finally:
        new.undo()
