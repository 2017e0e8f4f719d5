"""What a dev cluster can be told, and the ports, addresses and names that follow from it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from clusters.dev import ports

BRIDGES = "dinoctl-"
"""Beginning of the names of the bridges of all dev clusters on this machine."""

LINKS = Path("/sys/class/net")
PORTS_OF_A_NODE = 3
MOST_NODES = 10
PARTS = ("apiserver", "controllers", "scheduler", "jobset", "webhook", "kwok", "etcd", "peer", "coredns")
"""What has a port on 127.0.0.1, in this order. All but webhook (of jobset) and peer (of etcd) are daemons; CoreDNS
listens on the gateway's port 53 instead. The API server listens on every address: pods find it at the gateway's."""


@dataclass(frozen=True)
class Settings:
    """Times are in seconds."""

    port: int
    """The API server's; all others follow it."""
    net: int
    """10.213.NET.0/24 is the network of the real nodes and their pods, on a bridge of this machine."""
    nodes: int = 2
    """Real nodes: real-0, ..."""
    fake_nodes: int = 32
    """gpu-000, ...: KWOK plays them and their pods."""
    gpus: int = 8
    """Of a node, real or fake. None is there: they are counted out, nothing can be computed on them."""
    node_grace: int = 15
    """How long a node may be silent before it is Unknown (Kubernetes' own: 50)."""
    toleration: int = 5
    """How long pods then stay on it before they are evicted (Kubernetes' own: 300)."""
    memory: int = 4096
    """MiB of a real node that the scheduler gives out: all of them share this machine's."""

    @property
    def node_names(self) -> list[str]:
        return [f"real-{number}" for number in range(self.nodes)]

    @property
    def fake_names(self) -> list[str]:
        return [f"gpu-{number:03}" for number in range(self.fake_nodes)]

    @property
    def lease(self) -> int:
        """A node says every quarter of that that it is there."""
        return max(4, self.node_grace * 4 // 5)

    @property
    def bridge(self) -> str:
        return f"{BRIDGES}{self.net}"

    @property
    def bridge_mac(self) -> str:
        """The gateway's address, after the two bytes of one that is nobody's product."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.gateway.split("."))

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def port_of(self, part: str) -> int:
        return self.port + PARTS.index(part)

    def kubelet_port(self, number: int) -> int:
        """Of real node `number`; after it that of its health, and that of containerd's streams."""
        return self.port + len(PARTS) + PORTS_OF_A_NODE * number

    def ports(self) -> range:
        """Every port that the cluster listens on."""
        return range(self.port, self.kubelet_port(self.nodes))

    @property
    def gateway(self) -> str:
        """This machine on the pods' network; the cluster's DNS listens there."""
        return f"10.213.{self.net}.1"

    def address(self, number: int) -> str:
        """Of real node `number`."""
        return f"10.213.{self.net}.{10 + number}"

    def pod_addresses(self, number: int) -> tuple[str, str]:
        """First and last of the pods of real node `number`."""
        return f"10.213.{self.net}.{50 + 20 * number}", f"10.213.{self.net}.{69 + 20 * number}"


def write(settings: Settings, folder: Path) -> None:
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1))


def read(folder: Path) -> Settings:
    """The settings of the cluster in `folder`, as `write` left them."""
    return Settings(**json.loads((folder / "settings.json").read_text()))


def free_port(nodes: int, wanted: int | None = None) -> int:
    """The first of as many neighbouring free ports as a cluster of `nodes` takes. Raises OSError if there are none."""
    return ports.free(len(Settings(0, 0, nodes).ports()), wanted)


def free_net(wanted: int | None = None) -> int:
    """A network that no other dev cluster has. Raises OSError if there is none."""
    for net in [wanted] if wanted is not None else random.sample(range(1, 255), 254):
        if not (LINKS / f"{BRIDGES}{net}").exists():
            return net
    raise OSError(f"network {wanted} is taken" if wanted is not None else "no free network found")
