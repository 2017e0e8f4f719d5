"""The daemons of the cluster besides its nodes: how each is called, and what it needs to find on the API server."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from pathlib import Path
from typing import Any

from clusters.dev.kubernetes import build
from clusters.dev.kubernetes.api import Api, Object
from clusters.dev.kubernetes.certificates import Authority
from clusters.dev.kubernetes.settings import Settings

TEMPLATES = Path(__file__).with_name("templates")
GANGS = "--feature-gates=GenericWorkload=true,GangScheduling=true"
"""PodGroups, of which all pods are placed or none: alpha in 1.36. What belongs to none is placed as ever."""

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/"


def etcd(folder: Path, settings: Settings) -> list[str]:
    clients, peers = (f"http://127.0.0.1:{settings.port_of(part)}" for part in ("etcd", "peer"))
    return [
        _program("etcd"), f"--data-dir={folder}/etcd", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}", f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
    ]  # fmt: skip


def apiserver(settings: Settings, authority: Authority) -> list[str]:
    names = f"IP:127.0.0.1,IP:{settings.gateway},DNS:localhost,DNS:kubernetes.default.svc"
    certificate, key = authority.issue("apiserver", "/CN=kube-apiserver", names)
    kubelet_user = "/O=system:masters/CN=kube-apiserver-kubelet-client"
    kubelet_certificate, kubelet_key = authority.issue("kubelet-client", kubelet_user)
    return [
        _program("kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{settings.port_of('etcd')}",
        "--bind-address=0.0.0.0",  # clients of this machine ask 127.0.0.1, pods the gateway
        "--anonymous-auth=false",  # and who else it is heard by has no certificate
        "--advertise-address=127.0.0.1", f"--secure-port={settings.port}",
        "--endpoint-reconciler-type=none",  # nothing has to be advertised
        f"--client-ca-file={authority.ca}", f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={authority.certs}/sa.pub",
        f"--service-account-signing-key-file={authority.certs}/sa.key",
        f"--kubelet-client-certificate={kubelet_certificate}", f"--kubelet-client-key={kubelet_key}",
        f"--kubelet-certificate-authority={authority.ca}",
        "--kubelet-preferred-address-types=InternalIP",  # for logs and exec it would try the node's name first
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--default-not-ready-toleration-seconds={settings.toleration}",
        f"--default-unreachable-toleration-seconds={settings.toleration}", "--profiling=false",
        GANGS, "--runtime-config=scheduling.k8s.io/v1alpha2=true",
    ]  # fmt: skip


def controllers(settings: Settings, authority: Authority) -> list[str]:
    return [
        _program("kube-controller-manager"), *_component(settings, authority, "controllers", "kube-controller-manager"),
        "--use-service-account-credentials=true", f"--service-account-private-key-file={authority.certs}/sa.key",
        f"--root-ca-file={authority.ca}", f"--node-monitor-grace-period={settings.node_grace}s",
        "--node-monitor-period=1s", GANGS,
    ]  # fmt: skip


def scheduler(settings: Settings, authority: Authority) -> list[str]:
    return [_program("kube-scheduler"), *_component(settings, authority, "scheduler", "kube-scheduler"), GANGS]


def _component(settings: Settings, authority: Authority, part: str, user: str) -> list[str]:
    file = authority.kubeconfig(part, f"/CN=system:{user}")
    options = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [
        *(f"--{option}={file}" for option in options), "--bind-address=127.0.0.1", "--leader-elect=false",
        f"--secure-port={settings.port_of(part)}", "--profiling=false",
    ]  # fmt: skip


# --- fake nodes -------------------------------------------------------------------------------------------------------


def kwok(folder: Path, settings: Settings, authority: Authority) -> list[str]:
    """A new one cannot take a node until the former one's lease expires: delete the leases then."""
    file = authority.kubeconfig("kwok", "/O=system:masters/CN=kwok")
    return [
        _program("kwok"), f"--kubeconfig={file}", f"--config={TEMPLATES / 'kwok.yaml'}",
        f"--node-lease-duration-seconds={settings.lease}", f"--server-address=127.0.0.1:{settings.port_of('kwok')}",
    ]  # fmt: skip


def fake_node(name: str, gpus: int) -> Object:
    """Tainted as GPU nodes are on most clusters."""
    number = int(name.rpartition("-")[2])
    labels = {
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "topology.kubernetes.io/zone": f"zone-{number // 16}",
    }  # fmt: skip
    amounts = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "10Ti", "pods": "110", "nvidia.com/gpu": str(gpus)}
    return {
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {"capacity": amounts, "allocatable": amounts},
    }  # fmt: skip


# --- JobSet -----------------------------------------------------------------------------------------------------------


def jobset(folder: Path, settings: Settings, authority: Authority, api: Api) -> list[str]:
    """With the definition and the role that it ships with."""
    own = folder / "jobset"
    own.mkdir(exist_ok=True)
    authority.kubeconfig("jobset", "/CN=jobset-controller")
    for name, file in zip(("tls.crt", "tls.key"), authority.issue("webhook", "/CN=jobset-webhook"), strict=True):
        (own / name).unlink(missing_ok=True)
        (own / name).symlink_to(file)
    definition, role = ((build.built() / name).read_text() for name in build.JOBSET_FILES)
    api.apply("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/jobsets.jobset.x-k8s.io", definition)
    group = "/apis/rbac.authorization.k8s.io/v1"
    api.apply(f"{group}/clusterroles/manager-role", role)
    api.apply(f"{group}/clusterrolebindings/jobset-manager", {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "jobset-manager"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "manager-role"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jobset-controller"}],
    })  # fmt: skip
    (own / "config.json").write_text(
        json.dumps({
            "apiVersion": "config.jobset.x-k8s.io/v1alpha1", "kind": "Configuration",
            "leaderElection": {"leaderElect": False}, "internalCertManagement": {"enable": False},
            "webhook": {"host": "127.0.0.1", "port": settings.port_of("webhook"), "certDir": str(own)},
            "metrics": {"bindAddress": "0"},
            "health": {"healthProbeBindAddress": f"127.0.0.1:{settings.port_of('jobset')}"},
        })
    )  # fmt: skip
    return [_program("jobset"), f"--config={own}/config.json", "--zap-log-level=info"]


def make_webhooks(settings: Settings, authority: Authority, api: Api) -> None:
    """As JobSet's own manifests have them, but for where the controller is. Once made, nothing gets past them."""
    group = "admissionregistration.k8s.io/v1"
    of_a_jobset = {"matchExpressions": [{"key": "jobset.sigs.k8s.io/jobset-name", "operator": "Exists"}]}
    for verb, operations in (("mutate", ["CREATE"]), ("validate", ["CREATE", "UPDATE"])):
        hooks = [
            _hook(settings, authority, verb, "jobset.x-k8s.io/v1alpha2", "jobsets", operations),
            {**_hook(settings, authority, verb, "v1", "pods", ["CREATE"]), "objectSelector": of_a_jobset},
        ]
        kind = {"mutate": "Mutating", "validate": "Validating"}[verb]
        api.apply(f"/apis/{group}/{kind.lower()}webhookconfigurations/jobset-{verb}", {
            "apiVersion": group, "kind": f"{kind}WebhookConfiguration", "metadata": {"name": f"jobset-{verb}"},
            "webhooks": hooks,
        })  # fmt: skip


def _hook(
    settings: Settings, authority: Authority, verb: str, version: str, resources: str, operations: list[str]
) -> dict[str, Any]:
    kind = resources.removesuffix("s")
    group, _, number = version.rpartition("/")
    path = "-".join([verb, group.replace(".", "-"), number, kind])
    bundle = base64.b64encode(authority.ca.read_bytes()).decode()
    return {
        "name": f"{verb[0]}{kind}.kb.io", "admissionReviewVersions": ["v1"], "sideEffects": "None",
        "failurePolicy": "Fail",
        "clientConfig": {"url": f"https://127.0.0.1:{settings.port_of('webhook')}/{path}", "caBundle": bundle},
        "rules": [
            {"apiGroups": [group], "apiVersions": [number], "resources": [resources], "operations": operations}
        ],
    }  # fmt: skip


# --- DNS --------------------------------------------------------------------------------------------------------------


def coredns(folder: Path, settings: Settings, authority: Authority) -> list[str]:
    """Outside of the cluster, on the bridge alone. A name lives a second: addresses of pods change quickly here."""
    file = authority.kubeconfig("coredns", "/O=system:masters/CN=dns")
    (folder / "Corefile").write_text(
        f"cluster.local:53 {{\n  bind {settings.gateway}\n  errors\n"
        f"  kubernetes cluster.local {{\n    kubeconfig {file}\n    ttl 1\n  }}\n}}\n"
    )
    return [_program("coredns"), f"-conf={folder}/Corefile"]


# --- whether they are well --------------------------------------------------------------------------------------------


def is_well(settings: Settings, part: str, path: str) -> bool:
    """Whether its health page says so. Raises OSError without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", settings.port_of(part), timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    finally:
        connection.close()


def listens(address: str, port: int) -> bool:
    """Raises OSError if nobody does."""
    with socket.create_connection((address, port), timeout=5):
        return True


def _program(name: str) -> str:
    return str(build.built() / "bin" / name)
