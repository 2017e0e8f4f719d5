"""Which of an attempt's nodes this process is on, as the scheduler that started it says. No torch.

Slurm names the node, the job and how often the job was restarted in the environment of each task. Whoever was started
by no scheduler is node 0 of 1. Another scheduler is one more function beside `_on_slurm`, asked in `here`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from model import contract


@dataclass(frozen=True)
class Node:
    """`job` is the scheduler's and tells its restarts apart (`<job id>.<restarts>`); empty: there is no scheduler.
    `hosts`: the names of all nodes in their order, as the scheduler knows them; empty where it does not say."""

    number: int
    count: int
    name: str  # as the scheduler knows this machine: what `exclude` takes
    job: str = ""
    hosts: tuple[str, ...] = ()

    def host(self, number: int) -> str:
        """What to call another node before it has said its name."""
        return self.hosts[number] if number < len(self.hosts) else f"node {number}"


def here(environment: Mapping[str, str]) -> Node:
    """The node that a process with this environment is on. Raises ValueError for one that contradicts itself."""
    if "SLURM_JOB_ID" in environment and "SLURM_NODEID" in environment:
        return _on_slurm(environment)
    return Node(0, 1, contract.hostname())  # issue 9: on Kubernetes the pod's JOB_COMPLETION_INDEX


def _on_slurm(environment: Mapping[str, str]) -> Node:
    """A step may have fewer nodes than its job has; its nodes are numbered in the order of their list."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    number = int(environment["SLURM_NODEID"])
    count = int(next((environment[name] for name in names if name in environment), "1"))
    if number >= count:
        raise ValueError(f"SLURM_NODEID is {number}, and the job's step has {count} nodes: start one task on each node")
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    return Node(
        number,
        count,
        environment.get("SLURMD_NODENAME") or contract.hostname(),
        f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT') or 0}",
        tuple(contract.hosts(listed)),
    )


def address() -> str:
    """How the other nodes reach this one."""
    return contract.hostname()


def free_port() -> int:
    """A port that nobody listens at now; whoever wants it takes it soon."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
