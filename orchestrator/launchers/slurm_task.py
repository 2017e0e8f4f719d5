"""What submitit's pickle calls on each node of a job: become the agent.

submitit's own process has then left no trace: its signal handlers (USR2 would requeue the job, TERM would be swallowed)
go with the exec, its result pickle is never written. A notice that comes sooner finds nothing trained yet: before
submitit has its handlers it ends the task, and with it the job, without a word; the controller sees that and goes on.
"""

from __future__ import annotations

import os
import signal
import sys

from model import contract, storage

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def become_agent(run_dir: str, attempt: int) -> None:
    """Replace this process by the agent of this node, its output in the node's own log. Never returns.

    The log is opened here and not by srun, as Slurm has no name for "the first node's log is agent.log".
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    log = storage.local_file(f"{run_dir}/{contract.agent_log(attempt, node)}")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    yaml = f"{run_dir}/{contract.attempt_yaml(attempt)}"
    os.execv(sys.executable, [sys.executable, "-P", "-m", "model.agent", yaml])
