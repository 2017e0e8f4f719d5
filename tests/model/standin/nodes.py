"""Agents of several nodes on this machine: what Slurm would tell each, and a disk of its own for each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from model import contract
from tests.model.standin.attempts import Case

SHORT = "from model import agent, team; import sys; {settings}; sys.exit(agent.main(sys.argv[1]))"
"""The agent with its long waits cut, where a test is about what happens after them."""


@dataclass
class Nodes:
    """The nodes of one job. `settings`: assignments to the agents' constants."""

    case: Case
    job: str = "77"
    restarts: int = 0
    count: int = 2
    settings: str = ""
    agents: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def tmp(self, node: int) -> Path:
        return self.case.run_dir.parent / f"{self.case.run_dir.name}-node{node + 1}"

    def start(self, *numbers: int) -> None:
        """Start the agents of these nodes, of all if none is named."""
        for node in numbers or range(self.count):
            self.tmp(node).mkdir(exist_ok=True)
            log = self.case.run_dir / contract.agent_log(self.case.attempt.attempt, node)
            log.parent.mkdir(parents=True, exist_ok=True)
            command = ["-c", SHORT.format(settings=self.settings)] if self.settings else ["-m", "model.agent"]
            with log.open("ab") as output:
                self.agents[node] = subprocess.Popen(
                    [sys.executable, "-P", *command, self.case.yaml],
                    env=os.environ | self.environment(node), stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip

    def environment(self, node: int) -> dict[str, str]:
        said = {
            "SLURM_JOB_ID": self.job, "SLURM_NODEID": str(node), "SLURM_NNODES": str(self.count),
            "SLURM_JOB_NODELIST": f"node[1-{self.count}]", "SLURMD_NODENAME": f"node{node + 1}",
            "TMPDIR": str(self.tmp(node)), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        return said | ({"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {})

    def takes_signals(self, node: int) -> bool:
        """Whether that agent is far enough for one not to end it."""
        status = Path(f"/proc/{self.agents[node].pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        return bool(caught >> (signal.SIGUSR2 - 1) & 1)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes of the agents, in the order of their nodes."""
        return [self.agents[node].wait(seconds) for node in sorted(self.agents)]

    def kill(self, node: int) -> None:
        """What the loss of a machine leaves: the agent and everything below it is gone at once."""
        agent = psutil.Process(self.agents[node].pid)
        family = [agent, *agent.children(recursive=True)]
        for process in family:
            process.suspend()
        for process in family:
            process.kill()

    def scratch(self, node: int) -> Path:
        """`contract.scratch_dir` as that node's processes see it."""
        return self.tmp(node) / f"dinoctl-{os.getuid()}" / self.case.attempt.launch_name

    def pulsing(self) -> bool:
        each = self.case.attempt.processes_per_node
        return all((self.scratch(rank // each) / f"pulse-{rank}").exists() for rank in range(self.count * each))

    def log(self, node: int) -> str:
        return (self.case.run_dir / contract.agent_log(self.case.attempt.attempt, node)).read_text()
