"""The launcher of this machine: each attempt's agent is a process in a session of its own, free of whoever started it.

An attempt is known again by its agent's command line, which ends in the attempt's own YAML, on the host that its
handle or its claim names. The run id and the digest travel in one environment variable, as labels do on a cluster.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from model import contract, storage
from model.contract import Attempt, Claim
from orchestrator.launchers.base import LaunchError, LaunchState, Observation, Query

LABEL = "DINOCTL_ATTEMPT"
START_SECONDS = 5.0
"""How long the kernel may take to begin a new process."""

SILENT_SECONDS = 300.0
"""An agent on another machine that has not been heard of for so long is gone, and its machine most likely too."""

KILL_SECONDS = 10.0
"""How long killed processes may take to be gone."""


@dataclass(frozen=True)
class Row:
    """One process of this machine's table that belongs to an attempt."""

    process: psutil.Process
    yaml: str
    is_agent: bool


class LocalLauncher:
    """Implements `orchestrator.launchers.base.Launcher`."""

    def render(self, attempt: Attempt, digest: str) -> str:
        log = str(storage.local(f"{attempt.run_dir}/{contract.agent_log(attempt.attempt)}"))
        command = shlex.join(_command(attempt))
        return f"{LABEL}={_label(attempt.run_id, digest)} {command} < /dev/null >> {shlex.quote(log)} 2>&1"

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        """Start the agent. What an earlier attempt of this run left behind without its agent is ended first."""
        end_orphans(attempt.run_dir)
        command = _command(attempt)
        try:
            log = storage.local_file(f"{attempt.run_dir}/{contract.agent_log(attempt.attempt)}")
            pid = os.posix_spawn(
                command[0],
                command,
                {**os.environ, LABEL: _label(attempt.run_id, digest)},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
            )
        except OSError as error:
            raise LaunchError(f"{attempt.launch_name} could not be started here: {error}") from error
        process = psutil.Process(pid)
        _wait_for_exec(process)
        return _handle(process)

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        agents = [row for row in _table() if row.is_agent]
        return [_observe(query, _its(query, agents)) for query in queries]

    def cancel(self, query: Query, *, hard: bool) -> None:
        """SIGTERM to the agent; `hard`: SIGKILL to it and to every process of the attempt. Raises LaunchError if the
        attempt runs on another machine or its processes do not die."""
        host = _host(query)
        if host not in (None, contract.hostname()):
            if hard and _silent_for(query) > SILENT_SECONDS:
                return
            raise LaunchError(f"{query.launch_name} runs on {host}: cancel it there")
        rows = [row for row in _table() if row.yaml == _yaml(query.run_dir, query.attempt)]
        if hard:
            _kill(rows)
            storage.remove_tree(str(contract.scratch_dir(query.launch_name)))
            return
        for row in _its(query, [row for row in rows if row.is_agent]):
            with suppress(psutil.NoSuchProcess):
                row.process.send_signal(signal.SIGTERM)

    def clear(self, queries: Sequence[Query]) -> None:
        """Nothing: this machine has no queue."""

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        return None


def _wait_for_exec(process: psutil.Process) -> None:
    """posix_spawn returns a moment before the kernel shows the new command line, by which the agent is known."""
    deadline = time.monotonic() + START_SECONDS
    with suppress(psutil.NoSuchProcess):
        while not process.cmdline() and time.monotonic() < deadline:
            time.sleep(0.001)


def end_orphans(run_dir: str) -> None:
    """End the processes of this run's attempts whose agent is gone. They should have died with it."""
    rows = [row for row in _table() if row.yaml.startswith(f"{run_dir}/{contract.ATTEMPTS_DIR}/")]
    led = {row.yaml for row in rows if row.is_agent}
    _kill([row for row in rows if row.yaml not in led])


def _command(attempt: Attempt) -> list[str]:
    return [sys.executable, "-P", "-m", "model.agent", _yaml(attempt.run_dir, attempt.attempt)]


def _yaml(run_dir: str, attempt: int) -> str:
    return f"{run_dir}/{contract.attempt_yaml(attempt)}"


def _label(run_id: str, digest: str) -> str:
    return f"{run_id}:{digest}"


def _handle(process: psutil.Process) -> dict[str, Any]:
    """Where to look for it, and for a person, what it was."""
    return {
        "pid": process.pid,
        "started": process.create_time(),
        "boot_id": contract.boot_id(),
        "host": contract.hostname(),
    }


def _observe(query: Query, agents: Sequence[Row]) -> Observation:
    """The answer to one query; `agents` are the processes here that are its agent."""
    host = _host(query)
    if host not in (None, contract.hostname()):
        if (silent := _silent_for(query)) > SILENT_SECONDS:
            detail = f"on {host}, and its agent has not reached the bucket for {silent:.0f} s"
            return Observation(LaunchState.ENDED, query.handle, detail)
        return Observation(LaunchState.UNKNOWN, query.handle, f"on {host}, which cannot be seen from here")
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            handle = query.handle or _handle(agent.process)
            return Observation(LaunchState.RUNNING, handle, f"pid {agent.process.pid} on this machine")
    if query.handle is not None:
        with suppress(ChildProcessError):  # whoever submitted it is its parent, and buries it
            os.waitpid(query.handle["pid"], os.WNOHANG)
        return Observation(LaunchState.ENDED, query.handle, f"pid {query.handle['pid']} is gone")
    if host is not None:
        return Observation(LaunchState.ENDED, None, "claimed, and its agent is gone")
    return Observation(LaunchState.ABSENT)


def _its(query: Query, agents: Sequence[Row]) -> list[Row]:
    """Those of `agents` that run the query's attempt: its YAML, under its run id and digest.

    Not by pid: where two were submitted (a launcher knows no unique names) the one that holds the claim counts.
    """
    yaml = _yaml(query.run_dir, query.attempt)
    return [row for row in agents if row.yaml == yaml and _labelled(row.process, _label(query.run_id, query.digest))]


def _labelled(process: psutil.Process, label: str) -> bool:
    try:
        return process.environ().get(LABEL) == label
    except psutil.AccessDenied:  # another user's process: its command line must do
        return True
    except psutil.NoSuchProcess:
        return False


def _host(query: Query) -> str | None:
    """Where the attempt was started: as its handle says, else its claim. None: nothing says so."""
    if query.handle is not None:
        return str(query.handle["host"])
    path = f"{query.run_dir}/{contract.claim_file(query.attempt)}"
    try:
        claim = contract.decode(storage.read(path), Claim, path)
    except FileNotFoundError:
        return None
    return claim.host if claim.launch_name == query.launch_name else None


def _silent_for(query: Query) -> float:
    """Seconds since the agent of an attempt on another machine last renewed its claim, which it does in a bucket alone.

    One that cannot ends by itself sooner (`model.link`); one that lives in spite of that is told by `closed.json`.
    """
    if not storage.is_uri(query.run_dir):
        return 0.0
    try:
        return contract.now() - storage.modified(f"{query.run_dir}/{contract.claim_file(query.attempt)}")
    except FileNotFoundError:  # it has not begun
        return 0.0


def _table() -> list[Row]:
    """This machine's processes that belong to attempts, read once. Zombies have no command line, and are dead."""
    return [row for process in psutil.process_iter(["cmdline", "status"]) if (row := _row(process))]


def _row(process: psutil.Process) -> Row | None:
    """Agent, torchrun and ranks all end in `model.<module> ATTEMPT_YAML`; an editor that shows the file does not."""
    if process.info["status"] == psutil.STATUS_ZOMBIE:
        return None
    words = process.info["cmdline"] or []
    if len(words) < 3 or not words[-2].startswith("model."):
        return None
    return Row(process, words[-1], words[-3:-1] == ["-m", "model.agent"])


def _kill(rows: Sequence[Row]) -> None:
    """SIGKILL to these and all below them, agents first, until none is left. Raises LaunchError if some do not die."""
    agents_first = sorted(rows, key=lambda row: not row.is_agent)
    family = [process for row in agents_first for process in _family(row.process)]
    doomed = [process for process in family if process.pid != os.getpid()]  # an agent's `on_end` may be who kills
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + KILL_SECONDS
    while left := [process.pid for process in doomed if _alive(process)]:
        if time.monotonic() > deadline:
            raise LaunchError(f"processes {left} were killed and do not die; they may wait for a disk or a device")
        time.sleep(0.02)


def _family(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    with suppress(psutil.NoSuchProcess):
        yield from process.children(recursive=True)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
