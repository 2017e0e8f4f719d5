"""The processes of an attempt on one node: how the agent starts them, and how it ends every one. No torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from model import contract, storage
from model.contract import Attempt
from model.link import say
from model.signals import held
from model.team import Team
from model.watch import LINGER_SECONDS

PR_SET_CHILD_SUBREAPER = 36

MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}" for name in ("mmap_threshold=33554432", "trim_threshold=4294967296", "tcache_count=0")
    ),
    "MKL_DISABLE_FAST_MM": "1",
}
"""How a process on Linux gets memory for tensors that lie in the host's.

A step frees and takes the same gigabytes again: what it freed is not given back to the kernel, which would clear every
page anew. Small objects may not settle for good in the gaps between tensors, where the next tensor of that size would
then not fit; and MKL keeps no buffers of its own between products. On a CPU the process is 6 % smaller for it
and a step no slower (ViT-S at the benchmark's sizes); results are the same bits.
"""


def command(attempt: Attempt, attempt_yaml: str, team: Team) -> list[str]:
    """The command line of the attempt's processes: torchrun over the ranks, or the one process of an evaluation.

    Several nodes meet at an address and a port that are agreed, and their numbers are given (torchrun's static
    rendezvous): no torchrun chooses, so that ranks are where the agents look for them.
    """
    python = [sys.executable, "-u", "-P", "-m"]
    if attempt.phase == contract.EVALUATE:
        return [*python, "model.rank", "model.evaluate.run", attempt_yaml]
    return [
        *python, "model.tied", str(os.getpid()), "torch.distributed.run",
        *_rendezvous(attempt, team), "--nproc-per-node", str(attempt.processes_per_node),
        "--max-restarts", "0", "--signals-to-handle", "SIGQUIT",  # it would hand others on to the ranks
        "--log-dir", str(contract.scratch_dir(attempt.launch_name) / "torchrun"),
        "-m", "model.rank", "model.train", attempt_yaml,
    ]  # fmt: skip


def _rendezvous(attempt: Attempt, team: Team) -> list[str]:
    if attempt.nodes == 1:  # the machine's name may resolve to nothing, or slowly
        return ["--standalone", "--nnodes", "1", "--local-addr", "127.0.0.1"]
    address, port = team.meeting
    number = str(team.node.number)
    return [
        "--nnodes", str(attempt.nodes), "--node-rank", number, "--master-addr", address, "--master-port", str(port),
    ]  # fmt: skip


def environment(attempt: Attempt) -> dict[str, str]:
    """The agent's own environment, and the code and the threads that the attempt is pinned to. An image brings its
    code with it: then the one that the agent runs is the ranks' too."""
    alone = {"GLOO_SOCKET_IFNAME": "lo"} if attempt.nodes == 1 else {}  # nothing leaves the machine
    code = {"PYTHONPATH": str(_code_here(attempt))} if attempt.code_dir else {}
    return {
        **MEMORY,
        **alone,
        **os.environ,
        **code,
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(attempt.threads),
    }


def start(attempt: Attempt, attempt_yaml: str, team: Team) -> subprocess.Popen[bytes]:
    """Start the processes in a session of their own, so that a terminal's Ctrl-C reaches the agent alone."""
    line = command(attempt, attempt_yaml, team)
    with held():
        return subprocess.Popen(line, env=environment(attempt), stdin=subprocess.DEVNULL, start_new_session=True)


def adopt_orphans() -> None:
    """Descendants whose parent died become the agent's children (prctl(2)), so that it finds and ends them all."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")


def fresh_scratch(attempt: Attempt) -> None:
    """An empty folder of ours alone: others may write to the machine's temporary folder too."""
    scratch = contract.scratch_dir(attempt.launch_name)
    storage.own_scratch()
    storage.remove_tree(str(scratch))
    scratch.mkdir(mode=0o700)


def _code_here(attempt: Attempt) -> Path:
    """Where on this machine the code is that the attempt is pinned to."""
    if storage.is_uri(attempt.code_dir):
        return contract.scratch_dir(attempt.launch_name) / "code"
    return Path(attempt.code_dir)


def fetch_code(attempt: Attempt) -> str:
    """Bring the code out of a bucket; why it cannot be run if it is not what its digest says, else nothing. On a disk
    it is run where it lies, as the controller has looked at it."""
    if not storage.is_uri(attempt.code_dir):
        return ""
    files = storage.contents(f"{attempt.code_dir}/model")
    if storage.digest(files) != attempt.code_digest:
        return f"{attempt.code_dir}/model is not the code that this run is pinned to (sha256 {attempt.code_digest})"
    for name, data in files.items():
        target = _code_here(attempt) / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return ""


def reap(but: int) -> None:
    """Take leave of the ended children that nobody else waits for: processes whose parent died before them (of a pod
    the agent is the first process, elsewhere it adopts them). `but`: a pid that is waited for."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != but:
            os.waitpid(ended.si_pid, 0)


def kill_descendants() -> None:
    """End every process below this one, at once. A process that the kernel will not end is named and left."""
    deadline = time.monotonic() + LINGER_SECONDS
    while living := _living():
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if time.monotonic() > deadline:
            say(f"these processes do not die: {[process.pid for process in living]}")
            return
        time.sleep(0.02)


def _living() -> list[psutil.Process]:
    """This process's descendants; a zombie is dead."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living
