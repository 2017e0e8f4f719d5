"""Pods as the agent sees them: it is the first process of a process table, with a host name and an /etc/hosts of its
own. Without the cluster: the network is this machine's, and the names in /etc/hosts are what a DNS would know."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from model import contract
from tests.model.standin.attempts import Case, wait_for

INSIDE = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf; shift 2
exec "$@"
"""


@dataclass
class Pods:
    """The pods of one attempt. Their code is the stand-in's copy, as if their image had it."""

    case: Case
    folder: Path
    code: str
    yaml: str = ""
    agents: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, *, known: bool = True) -> None:
        """known: the DNS knows the pods' names from the beginning."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\nhosts: files\n")
        if known:
            self.name_them()
        for node in range(self.case.attempt.nodes):
            tmp = self.folder / f"tmp-{node}"
            tmp.mkdir()
            with (self.folder / f"kubelet-{node}").open("wb") as output:
                self.agents[node] = subprocess.Popen(
                    ["unshare", "--fork", "--pid", "--mount-proc", "--uts", "--kill-child", "sh", "-euc", INSIDE, "sh",
                     f"{self.name}-{node}", str(self.folder),
                     sys.executable, "-P", "-m", "model.agent", self.yaml or self.case.yaml],
                    env=os.environ | self.environment(node) | {"TMPDIR": str(tmp)}, stdout=output, stderr=output,
                )  # fmt: skip

    @property
    def name(self) -> str:
        return self.case.attempt.launch_name

    def name_them(self) -> None:
        with (self.folder / "hosts").open("a") as hosts:
            for node in range(self.case.attempt.nodes):
                hosts.write(f"127.0.0.1 {self.name}-{node}.{self.name} {self.name}-{node}\n")

    def environment(self, node: int) -> dict[str, str]:
        return {
            "DINOCTL_NODE": str(node), "DINOCTL_NODES": str(self.case.attempt.nodes), "DINOCTL_JOB": "5e8a",
            "DINOCTL_ADDRESS": f"{self.name}-{node}.{self.name}", "DINOCTL_HOST": f"gpu{node}",
            "PYTHONPATH": str(self.code), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip

    def agent(self, node: int = 0) -> psutil.Process:
        """The first process of that pod."""
        return wait_for(lambda: psutil.Process(self.agents[node].pid).children())[0]

    def wait(self) -> list[int]:
        """The exit codes, as a kubelet sees them."""
        return [agent.wait(300) for _, agent in sorted(self.agents.items())]

    def printed(self, node: int = 0) -> str:
        return (self.folder / f"kubelet-{node}").read_text()

    def log(self, node: int = 0) -> str:
        return (self.case.run_dir / contract.agent_log(1, node)).read_text()

    def pulsing(self) -> bool:
        return all(list((self.folder / f"tmp-{node}").rglob("pulse-*")) for node in self.agents)
