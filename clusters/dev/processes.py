"""The processes of a dev cluster: found by a mark in their environment, as nothing else tells two clusters apart.

Every daemon is started with `DEV_CLUSTER_PART=FOLDER#PART`, and what it starts inherits it: slurmstepd from its slurmd
(the task prolog gives it to every task), containerd's shims from their containerd (a pod's processes descend from
them). A part is a daemon (slurmctld, etcd, ...) or a node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MARK = "DEV_CLUSTER_PART"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PREFERRED = ("sh", "-c", '{ echo -10 > /proc/self/autogroup; } 2> /dev/null; exec nice -n -10 "$@"', "sh")
"""Before a daemon's command, within `setsid`: in preference to all else, as a real one has a machine of its own. Linux
groups what runs by session where a kernel has autogroups, and a process's niceness counts in its group alone."""


def start(folder: Path, part: str, command: list[str], **environment: str) -> None:
    """Start a daemon of that part, away from our own environment. It goes to the background by itself, and has said by
    then why it cannot. Raises RuntimeError with that."""
    marked: Mapping[str, str] = {
        "PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **environment, MARK: f"{folder}#{part}",
    }  # fmt: skip
    output = folder / "log" / f"{part}.out"
    with output.open("ab") as log:
        done = subprocess.run(
            command, env=marked, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
            start_new_session=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{part} does not start: {' '.join(command)}\n{tail(output)}")


def tail(file: Path, lines: int = 10) -> str:
    """The last lines of a log, "" where there is none."""
    with suppress(OSError):
        return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
    return ""


def find(folder: Path, part: str | None = None) -> list[int]:
    """The processes of that part, or of the whole cluster, and what descends from them; zombies are dead."""
    parents, marked = {}, set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError):
            pid = int(entry.name)
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            parents[pid] = int(parent)
            if _mark(entry) == f"{folder}#{part}" or (part is None and _mark(entry).startswith(f"{folder}#")):
                marked.add(pid)
    mine = _ancestors(os.getpid(), parents)  # `down`, called within a job of the cluster, does not end itself
    return [pid for pid in parents if pid not in mine and not marked.isdisjoint(_ancestors(pid, parents))]


def end(folder: Path, part: str | None = None, *, sig: signal.Signals = signal.SIGKILL, seconds: float = 20.0) -> None:
    """Send `sig` to the processes of that part, or of the whole cluster, and wait until they are gone; those that are
    not by then are killed. Raises RuntimeError for what the kernel does not end."""
    deadline = time.monotonic() + seconds
    signalled: set[int] = set()
    while pids := find(folder, part):
        late = time.monotonic() > deadline
        if time.monotonic() > deadline + seconds:
            raise RuntimeError(f"these processes do not die: {pids}")
        for pid in pids:
            if sig == signal.SIGKILL or late or pid not in signalled:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else sig)
                signalled.add(pid)
        time.sleep(0.02)


def _mark(entry: Path) -> str:
    for variable in (entry / "environ").read_bytes().split(b"\0"):
        name, _, value = variable.partition(b"=")
        if name.decode(errors="replace") == MARK:
            return value.decode(errors="replace")
    return ""


def _ancestors(pid: int, parents: Mapping[int, int]) -> set[int]:
    """`pid` itself and those above it."""
    found = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found
