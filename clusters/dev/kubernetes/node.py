"""One real node: containerd, runc and a kubelet on this machine, its pods on the cluster's bridge."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from clusters.dev import processes
from clusters.dev.kubernetes import build, image
from clusters.dev.kubernetes.certificates import Authority
from clusters.dev.kubernetes.settings import BRIDGES, LINKS, Settings

TEMPLATES = Path(__file__).with_name("templates")
CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io")
FIXED = ("run/containerd", "var/lib/cni", "var/lib/kubelet", "var/log/containers")
"""Folders of containerd, CNI and the kubelet that no setting moves: each node has its own there, bound over them."""

SYSCTLS = (
    "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)  # fmt: skip
"""What a kubelet changes."""

GPU = "nvidia.com/gpu"
REAL = "dinoctl-dev/real"
"""The label of real nodes."""

WHOLE_NODE = "dinoctl.dev/node"
"""A resource of which each real node has one: pods that ask for it get a node each, though all are one machine."""

EVICTION = ("memory.available", "nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree")


@dataclass(frozen=True)
class Node:
    """Real node `number` of the cluster in `folder`. Its processes are the part of its name."""

    folder: Path
    settings: Settings
    authority: Authority
    number: int

    @property
    def name(self) -> str:
        return f"real-{self.number}"

    @property
    def own(self) -> Path:
        return self.folder / self.name

    @property
    def socket(self) -> Path:
        return self.own / "run" / "c.sock"

    @property
    def cgroup(self) -> str:
        return f"{self.settings.bridge}/{self.name}"

    # --- start and end ------------------------------------------------------------------------------------------------

    def start_containerd(self) -> None:
        """What a machine that was cut off left of its last boot is cleared away first, as a boot does."""
        self.clear()
        for name in FIXED:
            (self.own / "own" / name).mkdir(parents=True)
            Path("/", name).mkdir(parents=True, exist_ok=True)
        for name in ("run", "cni", "log", "plugins"):
            (self.own / name).mkdir(parents=True, exist_ok=True)
        _address("add", self.settings.address(self.number), self.settings.bridge)
        self._make_cgroups()
        self._write_files()
        start = ["unshare", "--mount", "sh", str(self.own / "node.sh")]
        processes.start(self.folder, self.name, ["setsid", "--fork", *start])

    def has_containerd(self) -> bool:
        """Whether it answers, and has the images."""
        if self._ctr("version") is None:
            return False
        if image.HOST not in (self._ctr("images", "ls", "-q") or ""):
            return self._ctr("images", "import", str(build.built() / "images.tar")) is not None
        return True

    def start_kubelet(self) -> None:
        """Beside containerd, in its mount namespace. On a machine that others keep busy its node would be lost; what
        runs in pods is containerd's, and takes its turn."""
        containerd = next(pid for pid in processes.find(self.folder, self.name) if _command(pid) == "containerd")
        kubeconfig = self.authority.kubeconfig(f"kubelet-{self.number}", f"/O=system:nodes/CN=system:node:{self.name}")
        beside = ["nsenter", f"--mount=/proc/{containerd}/ns/mnt", str(build.built() / "bin" / "kubelet")]
        processes.start(self.folder, self.name, [
            "setsid", "--fork", *processes.PREFERRED, *beside,
            f"--config={self.own}/kubelet.json", f"--kubeconfig={kubeconfig}", f"--root-dir={self.own}/kubelet",
            f"--cert-dir={self.own}/certs", f"--hostname-override={self.name}",
            f"--node-ip={self.settings.address(self.number)}", f"--node-labels={REAL}=true",
        ])  # fmt: skip

    def clear(self) -> None:
        """What its processes left when they ended: cgroups, and files that a boot would not find again."""
        for root in (CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())):
            _remove_cgroups(root / self.cgroup)
        for name in ("run", "own", "ipam"):
            shutil.rmtree(self.own / name, ignore_errors=True)

    # --- its files ----------------------------------------------------------------------------------------------------

    def _make_cgroups(self) -> None:
        second = (CGROUPS / "cgroup.controllers").exists()
        roots = [CGROUPS] if second else [p for p in CGROUPS.iterdir() if p.is_dir() and p.name != "unified"]
        for root in roots:
            (root / self.cgroup).mkdir(parents=True, exist_ok=True)
            parents = (root, root / self.settings.bridge)
            for name in ("cpuset.cpus", "cpuset.mems"):  # a new one of version 1 is empty, and nothing can run in it
                if not second and (root / name).exists():
                    for group in (root / self.settings.bridge, root / self.cgroup):
                        (group / name).write_text((root / name).read_text())
            for parent in parents if second else ():
                for controller in CONTROLLERS:
                    with suppress(OSError):  # not each kernel has each
                        (parent / "cgroup.subtree_control").write_text(f"+{controller}")

    def _write_files(self) -> None:
        port = self.settings.kubelet_port(self.number)
        values = {
            "node": self.own, "socket": self.socket, "bin": build.built() / "bin", "stream_port": port + 2,
            "runc": shutil.which("runc", path=processes.PATH), "snapshotter": _snapshotter(self.own),
            "fixed": " ".join(FIXED), "sysctls": " ".join(SYSCTLS),
            "log": self.folder / "log" / f"containerd-{self.number}.out",
        }  # fmt: skip
        for name in ("containerd.toml", "node.sh"):
            (self.own / name).write_text(Template((TEMPLATES / name).read_text()).substitute(values))
        (self.own / "resolv.conf").write_text(f"nameserver {self.settings.gateway}\n")
        (self.own / "cni" / "10-bridge.conflist").write_text(json.dumps(self._network()))
        (self.own / "kubelet.json").write_text(json.dumps(self._kubelet(port), indent=1))

    def _network(self) -> dict[str, Any]:
        first, last = self.settings.pod_addresses(self.number)
        gateway = self.settings.gateway
        span = {"subnet": f"{gateway}/24", "rangeStart": first, "rangeEnd": last, "gateway": gateway}
        span["subnet"] = gateway.rpartition(".")[0] + ".0/24"
        addresses = {
            "type": "host-local", "dataDir": f"{self.own}/ipam", "ranges": [[span]],
            "routes": [{"dst": "0.0.0.0/0", "gw": gateway}],
        }  # fmt: skip
        bridge = {"type": "bridge", "bridge": self.settings.bridge, "isGateway": False, "ipMasq": False, "mtu": 1400}
        return {"cniVersion": "1.0.0", "name": self.settings.bridge, "plugins": [{**bridge, "ipam": addresses}]}

    def _kubelet(self, port: int) -> dict[str, Any]:
        address = self.settings.address(self.number)
        certificate, key = self.authority.issue(f"{self.name}-server", f"/CN={self.name}", f"IP:{address}")
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": address, "port": port, "healthzBindAddress": "127.0.0.1", "healthzPort": port + 1,
            "authentication": {
                "anonymous": {"enabled": False}, "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self.authority.ca)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": str(certificate), "tlsPrivateKeyFile": str(key),
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{self.cgroup}", "failCgroupV1": False,
            "enforceNodeAllocatable": ["pods"],
            "systemReserved": {"memory": f"{max(0, _memory() - self.settings.memory)}Mi"},
            "failSwapOn": False, "protectKernelDefaults": False, "makeIPTablesUtilChains": False,
            "localStorageCapacityIsolation": False, "evictionHard": dict.fromkeys(EVICTION, "0%"),
            "imageGCHighThresholdPercent": 100,
            "resolvConf": f"{self.own}/resolv.conf", "clusterDNS": [self.settings.gateway],
            "clusterDomain": "cluster.local",
            "podLogsDir": f"{self.own}/log", "volumePluginDir": f"{self.own}/plugins",
            "nodeStatusUpdateFrequency": "5s", "nodeLeaseDurationSeconds": self.settings.lease,
            "syncFrequency": "10s", "maxPods": 20,
        }  # fmt: skip

    def _ctr(self, *words: str) -> str | None:
        command = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None


# --- what all nodes of a cluster share --------------------------------------------------------------------------------


def make_bridge(settings: Settings) -> None:
    """With an address of its own: else it takes the lowest of its pods', another with each that comes or goes, and what
    the others send to it is lost until they ask for it again."""
    if not (LINKS / settings.bridge).exists():
        _ip("link", "add", settings.bridge, "address", settings.bridge_mac, "type", "bridge")
        _ip("link", "set", settings.bridge, "up")
    _address("add", settings.gateway, settings.bridge)


def remove_shared(settings: Settings) -> None:
    """The bridge, the cluster's cgroups and, with the last cluster, the folders that nodes are bound over."""
    if (LINKS / settings.bridge).exists():
        _ip("link", "del", settings.bridge)
    for root in (CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())):
        _remove_cgroups(root / settings.bridge)
    if not any(link.name.startswith(BRIDGES) for link in LINKS.iterdir()):
        for name in FIXED:
            with suppress(OSError):  # not there, or somebody else's
                Path("/", name).rmdir()


def _remove_cgroups(top: Path) -> None:
    if top.is_dir():
        groups = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
        for group in (*groups, top):
            _remove_cgroup(group)


def _remove_cgroup(group: Path, patience: float = 10.0) -> None:
    """It is busy for a moment after its last process has ended."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _address(act: str, address: str, bridge: str) -> None:
    shown = subprocess.run(["ip", "-o", "addr", "show", "dev", bridge], capture_output=True, text=True, check=True)
    if f" {address}/" not in shown.stdout:
        _ip("addr", act, f"{address}/24", "dev", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _snapshotter(folder: Path) -> str:
    """An overlay cannot lie on an overlay, as the root of a container often is."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout
    return "native" if kind.strip() == "overlayfs" else "overlayfs"


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _memory() -> int:
    """MiB of this machine."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return int(line.split()[1]) // 1024
