"""The dev cluster itself: it is a Kubernetes, its nodes are like machines of their own, and nothing of it stays."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusters.dev import processes
from clusters.dev.kubernetes import node
from clusters.dev.kubernetes.settings import BRIDGES, LINKS
from orchestrator.cluster import read_cluster
from tests.kubernetes.cluster import FAKE, GPU, Cluster, ClusterError, Place, Settings, lacking, running

pytestmark = [pytest.mark.requires("kubernetes"), pytest.mark.jobs]

SCRIPTS = Path(__file__).parents[2] / "clusters" / "dev" / "kubernetes"
LOOK = """
import os, pathlib, sys, time, torch, model.contract
pathlib.Path("/tmp/mine").touch()
pathlib.Path(sys.argv[1], os.environ["NODE"]).write_text(f"{torch.ones(3).sum():g} {os.listdir('/tmp')} {os.getpid()}")
print("done", flush=True)
time.sleep(600)
"""


def job(name: str, section: dict[str, Any], *command: str, pods: int = 2) -> dict[str, Any]:
    """An Indexed Job with the least that a profile's section says: pods of which each node holds one."""
    volumes = section.get("volumes", {})
    mounts = [{"name": of, "mountPath": told["path"], "readOnly": told["read_only"]} for of, told in volumes.items()]
    sources = [{"name": of, "hostPath": {"path": told["host_path"]}} for of, told in volumes.items()]
    container = {
        "name": "agent", "image": section["image"], "command": list(command), "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "resources": {"limits": {GPU: "8"}}, "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "nodeSelector": section["node_selector"],
        "tolerations": [{"key": GPU, "operator": "Exists"}], "priorityClassName": "low", "containers": [container],
        "subdomain": name, "volumes": [*sources, {"name": "tmp", "emptyDir": {}}],
    }  # fmt: skip
    spec = {"completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimit": 0}
    template = {"metadata": {"labels": {"app": name}}, "spec": pod}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {**spec, "template": template}}


def pods(place: Place, *, phase: str = "Running") -> list[dict[str, Any]]:
    """Those in that phase that nobody deletes."""
    found = place.get("pods")["items"]
    return [each for each in found if each["status"]["phase"] == phase and "deletionTimestamp" not in each["metadata"]]


def are(place: Place, count: int) -> Callable[[], bool]:
    return lambda: len(pods(place)) == count


def test_pods_run_this_checkout_on_nodes_of_their_own(real_nodes: Place, tmp_path: Path) -> None:
    section = real_nodes.pod_section(tmp_path)
    real_nodes.create(job("look", section, section["python"], "-P", "-c", LOOK, str(tmp_path)))
    real_nodes.wait(lambda: len(list(tmp_path.iterdir())) == 2, "both pods to have written")
    said = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(said) == {"real-0", "real-1"}
    for words in said.values():
        assert words.startswith("3 ")  # torch's
        assert "'mine'" in words  # each has a /tmp of its own
        assert words.endswith(" 1")  # the first process of its pod
    name = pods(real_nodes)[0]["metadata"]["name"]
    assert real_nodes.kubectl("logs", name) == "done\n"
    assert real_nodes.kubectl("exec", name, "--", "sh", "-c", "echo $NODE").startswith("real-")
    ours = real_nodes.ours.settings  # with a bridge's own address, which no pod that comes or goes changes
    assert (LINKS / ours.bridge / "address").read_text().strip() == ours.bridge_mac


def test_pods_find_each_other_by_name(real_nodes: Place) -> None:
    find = "import socket,sys,time\nwhile True:\n  try: print(socket.gethostbyname('ask-0.ask')); sys.exit()\n"
    find += "  except OSError: time.sleep(.2)"
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": "ask"}}
    real_nodes.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "ask"}, "spec": service})
    section = real_nodes.pod_section()
    real_nodes.create(job("ask", section, section["python"], "-c", find))
    real_nodes.wait(lambda: len(pods(real_nodes, phase="Succeeded")) == 2, "both to have found it")
    told = {real_nodes.kubectl("logs", pod["metadata"]["name"]).strip() for pod in pods(real_nodes, phase="Succeeded")}
    first = next(pod for pod in pods(real_nodes, phase="Succeeded") if pod["metadata"]["name"].startswith("ask-0"))
    assert len(told) == 1
    assert told.pop().startswith(f"10.213.{real_nodes.ours.settings.net}.")
    assert first["spec"]["hostname"] == "ask-0"


def test_a_killed_node_is_lost_and_comes_back_without_its_pods(real_nodes: Place, tmp_path: Path) -> None:
    section = real_nodes.pod_section(tmp_path)
    real_nodes.create(job("stay", section, "sleep", "600"))
    real_nodes.wait(are(real_nodes, 2), "both pods to run")
    real_nodes.kill_node("real-1")
    assert processes.find(real_nodes.ours.folder, "real-1") == []
    real_nodes.wait(lambda: not real_nodes.ours.node_is_ready("real-1"), "real-1 to be lost")
    real_nodes.wait(are(real_nodes, 1), "its pod to be evicted")
    real_nodes.start_node("real-1")
    gone = lambda: all(pod["spec"]["nodeName"] != "real-1" for pod in real_nodes.get("pods")["items"])  # noqa: E731
    real_nodes.wait(gone, "its pod to be gone")


def test_a_pod_of_high_preempts_one_of_low_and_the_api_server_comes_back(real_nodes: Place) -> None:
    real_nodes.create(job("low", real_nodes.pod_section(), "sleep", "600"))
    real_nodes.wait(are(real_nodes, 2), "both pods to run")
    real_nodes.restart_apiserver()
    assert len(pods(real_nodes)) == 2
    (bully,) = real_nodes.preempt("real-0")
    on = lambda: [p["metadata"]["name"] for p in pods(real_nodes) if p["spec"]["nodeName"] == "real-0"]  # noqa: E731
    real_nodes.wait(lambda: on() == [bully], "the pod of high to run")
    real_nodes.release(bully)


def test_fake_nodes_hold_pods_and_fall_silent(kubernetes: Place) -> None:
    fake = kubernetes.fake_section()
    kubernetes.create(job("fake", fake, "true", pods=32))
    kubernetes.wait(are(kubernetes, 32), "all pods to run")
    assert len({pod["spec"]["nodeName"] for pod in pods(kubernetes)}) == 32
    assert len(kubernetes.get("nodes", "-l", "=".join(*FAKE.items()))["items"]) == 32
    kubernetes.kill_node("gpu-003")
    kubernetes.wait(lambda: not kubernetes.ours.node_is_ready("gpu-003"), "gpu-003 to be lost")
    kubernetes.start_node("gpu-003")
    assert kubernetes.ours.node_is_ready("gpu-003")


def test_jobsets_are_run_by_their_controller_and_looked_at_by_its_webhooks(kubernetes: Place) -> None:
    made = job("of", kubernetes.fake_section(), "true", pods=4)
    replicated = {"name": "node", "replicas": 1, "template": {"spec": made["spec"]}}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "four"},
        "spec": {"replicatedJobs": [replicated]},
    }  # fmt: skip
    kubernetes.create(jobset)
    kubernetes.wait(are(kubernetes, 4), "its pods to run")
    with pytest.raises(ClusterError, match=r'admission webhook "vjobset.kb.io" denied'):
        kubernetes.create(jobset | {"metadata": {"name": "long-" * 12 + "x"}})


def test_up_and_down_are_one_command_each_and_leave_nothing(short_path: Path) -> None:
    folder = short_path / "k"
    sysctls = {name: Path("/proc/sys", name).read_text() for name in node.SYSCTLS}
    there = {name for name in node.FIXED if Path("/", name).exists()}
    up = [SCRIPTS / "up", "--folder", folder, "--nodes", "1", "--fake-nodes", "1"]
    try:
        done = subprocess.run(up, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"export KUBECONFIG={folder}/admin.kubeconfig" in done.stdout
        told = read_cluster(f"{folder}/dev_kubernetes.yaml")
        assert (told.launcher, told.kubernetes and told.kubernetes.image) == ("kubernetes", "localhost/dev/host:1")
        again = subprocess.run(up, capture_output=True, text=True, check=False)
        assert (again.returncode, again.stderr) == (2, f"{folder}: a cluster is up there; take it down first\n")
        cluster = Cluster.found(folder)
        cluster.kill_node("real-0")  # a node that ended badly leaves no more than the others
        bridge = cluster.settings.bridge
        assert (LINKS / bridge).exists()
    finally:
        subprocess.run([SCRIPTS / "down", "--folder", folder], check=False)
    assert not folder.exists()
    assert processes.find(folder) == []
    assert not (LINKS / bridge).exists()
    assert not list(node.CGROUPS.glob(f"**/{bridge}"))
    assert sysctls == {name: Path("/proc/sys", name).read_text() for name in node.SYSCTLS}
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    if not list(LINKS.glob(f"{BRIDGES}*")):  # another cluster's nodes need them
        assert {name for name in node.FIXED if Path("/", name).exists()} <= there


def test_a_cluster_that_cannot_be_brought_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="longer than 67 characters"), running(tmp_path / ("long" * 20)):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("clusters.dev.kubernetes.build.missing", lambda: ["bin/etcd"])
    assert lacking() == (
        "Go 1.26 or newer is needed to build Kubernetes, and there is none here: install it from https://go.dev/dl"
    )
    monkeypatch.setattr("os.getuid", lambda: 1000)
    assert lacking() == "root is needed: run it as root"


def test_ports_and_networks_of_clusters_do_not_meet() -> None:
    settings = Settings(20_000, 7)
    assert len(set(settings.ports())) == len(settings.ports()) == 9 + 2 * 3
    assert settings.kubelet_port(1) + 2 == settings.ports()[-1]
    assert {settings.address(9), settings.pod_addresses(9)[1]} == {"10.213.7.19", "10.213.7.249"}
    assert len(f"{BRIDGES}254") <= 15
