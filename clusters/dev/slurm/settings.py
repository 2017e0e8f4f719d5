"""What a dev cluster can be told, and the configuration files that follow from it."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Literal

from clusters.dev import ports

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Settings:
    """Times are in seconds."""

    port: int
    """The controller's port; slurmdbd and the nodes take those after it."""
    nodes: int = 2
    gpus: int = 8
    """Fake GPUs of a node: Slurm counts them out, nothing can be computed on them."""
    accounting: Literal["dbd", "none"] = "dbd"
    preempt_mode: Literal["REQUEUE", "CANCEL"] = "REQUEUE"
    grace: int = 30
    """GraceTime of partition `low`: what a preempted job is given before it is ended."""
    send_user_signal: bool = True
    """`preempt_send_user_signal`: a preempted job also gets the signal that it named with --signal."""
    proctrack: Literal["linuxproc", "pgid"] = "linuxproc"
    """Whom a signal reaches: every process of a step, or only the process group of its task."""
    kill_wait: int = 5
    """Between TERM and KILL."""
    node_timeout: int = 5
    """How long a node may be silent before it is DOWN."""
    min_job_age: int = 300
    """How long squeue goes on knowing a job that has ended."""

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def ports(self) -> list[int]:
        """Every port that the cluster listens on."""
        return list(range(self.port, self.port + 2 + self.nodes))


def address(number: int) -> str:
    """Where node `number` listens: each has an address of its own on the loopback."""
    return f"127.0.0.{10 + number}"


def write(settings: Settings, folder: Path) -> None:
    """Write all configuration files into the cluster's folder."""
    values = _values(settings, folder)
    for template in sorted(TEMPLATES.iterdir()):
        file = folder / template.name
        file.touch(mode=0o600)  # slurmdbd refuses a slurmdbd.conf that others can read
        file.write_text(Template(template.read_text()).substitute(values))
        file.chmod({"slurmdbd.conf": 0o600, "task_prolog": 0o755}.get(template.name, 0o644))
    hosts = [f"{address(number)} {name}" for number, name in enumerate(settings.node_names, 1)]
    (folder / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *hosts, ""]))
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1))


def read(folder: Path) -> Settings:
    """The settings of the cluster in `folder`, as `write` left them."""
    return Settings(**json.loads((folder / "settings.json").read_text()))


def _values(settings: Settings, folder: Path) -> dict[str, object]:
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address(number)} Port={settings.port + 1 + number}"
        f" CPUs=16 RealMemory=4096 Gres=gpu:{settings.gpus} State=UNKNOWN"
        for number, name in enumerate(settings.node_names, 1)
    ]
    accounting = {
        "none": ["AccountingStorageType=accounting_storage/none", "JobCompType=jobcomp/none"],
        "dbd": [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={settings.port + 1}",
            f"AccountingStoragePass={folder}/munge.socket",
            "AccountingStorageTRES=gres/gpu",
        ],
    }[settings.accounting]
    return {
        **asdict(settings),
        "folder": folder,
        "host": socket.gethostname().partition(".")[0],
        "controller_port": settings.port,
        "accounting_port": settings.port + 1,
        "controller_parameters": "SlurmctldParameters=preempt_send_user_signal" if settings.send_user_signal else "",
        "accounting": "\n".join(accounting),
        "nodes": "\n".join(nodes),
        "node_count": settings.nodes,
        "last_gpu": settings.gpus - 1,
    }


def free_port(nodes: int, wanted: int | None = None) -> int:
    """The first of as many neighbouring free ports as a cluster of `nodes` takes. Raises OSError if there are none."""
    return ports.free(len(Settings(0, nodes).ports()), wanted)
