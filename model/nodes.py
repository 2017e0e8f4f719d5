"""Which of an attempt's nodes this process is on, as the scheduler that started it says. No torch.

Slurm names the node, the job and how often the job was restarted in the environment of each task. A pod is told by
dinoctl, which writes into its manifest where Kubernetes is to fill the numbers in:

    DINOCTL_NODE, DINOCTL_NODES    its number, from 0, and how many there are
    DINOCTL_ADDRESS                how the other pods reach it: a name that the cluster's DNS knows, or an address
    DINOCTL_JOB, DINOCTL_HOST      what made the pod, and the machine that it is on

Whoever was started by no scheduler is node 0 of 1. Another scheduler is one more function beside these, asked in
`here`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from model import contract


@dataclass(frozen=True)
class Node:
    """`job` is the scheduler's and tells its restarts apart (`<job id>.<restarts>`, or the uid of what made a pod);
    empty: there is no scheduler. `hosts`: the names of all nodes in their order, as the scheduler knows them; empty
    where it does not say."""

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
    if in_a_pod(environment):
        return _in_a_pod(environment)
    if "SLURM_JOB_ID" in environment and "SLURM_NODEID" in environment:
        return _on_slurm(environment)
    return Node(0, 1, contract.hostname())


def in_a_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is a pod of an attempt, whose output and disk end with it."""
    return "DINOCTL_NODES" in environment


def _in_a_pod(environment: Mapping[str, str]) -> Node:
    """A Job makes a pod anew where one was lost; dinoctl's never does, so that the Job alone is no restart's name."""
    names = ("DINOCTL_NODE", "DINOCTL_NODES", "DINOCTL_ADDRESS", "DINOCTL_JOB", "DINOCTL_HOST")
    if missing := [name for name in names if not environment.get(name)]:
        raise ValueError(f"the pod's environment lacks {', '.join(missing)}: dinoctl's manifest of a pod sets them all")
    number, count = int(environment["DINOCTL_NODE"]), int(environment["DINOCTL_NODES"])
    if not 0 <= number < count:
        raise ValueError(f"DINOCTL_NODE is {number}, and the attempt has {count} pods")
    return Node(number, count, environment["DINOCTL_HOST"], environment["DINOCTL_JOB"])


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


def address(environment: Mapping[str, str] = os.environ) -> str:
    """How the other nodes reach this one."""
    return environment.get("DINOCTL_ADDRESS") or contract.hostname()


def free_port() -> int:
    """A port that nobody listens at now; whoever wants it takes it soon."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
