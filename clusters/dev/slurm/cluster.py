"""A real Slurm of virtual nodes on this machine, as root, without systemd: for `up` and `down`, and for the tests.

    munged ---- mariadbd <- slurmdbd <- slurmctld <- slurmd -N node1 (host name, /etc/hosts and TMPDIR of its own)
                                                  <- slurmd -N node2 ...

Everything lies in one folder: keys, sockets, database, logs, and slurm.conf with ports of its own. So several clusters
stand beside each other, and a Slurm of the machine's own is left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clusters.dev import processes
from clusters.dev.slurm import settings
from clusters.dev.slurm.settings import Settings

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "mariadb-install-db", "unshare", "mknod")
LONGEST_FOLDER = 64
"""A Unix socket's path has room for 107 characters; a step's is nodes/node10/spool/node10_12345.4294967291. Where it is
too long, a job is cancelled without a word."""

PATIENCE = 60.0
"""Seconds for anything that takes two on a quiet machine."""

AS_A_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -N "$1"'


class ClusterError(Exception):
    """The cluster cannot be brought up, or does not do what it was told; says what to do about it."""


def lacking() -> str:
    """What this machine lacks for a cluster and what to do about it; "" where one can be brought up."""
    if os.getuid() != 0:
        return "root is needed: run it as root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=processes.PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; clusters/dev/slurm/install, as root, installs it"
    own = ["unshare", "--mount", "--uts", "sh", "-c", "hostname node1 && mount --bind /etc/hosts /etc/hosts"]
    if subprocess.run(own, capture_output=True, check=False).returncode != 0:
        return "root may not give a process a host name and mounts of its own here: a container needs --privileged"
    return ""


@dataclass
class Cluster:
    """The cluster in `folder`, up or down."""

    folder: Path
    settings: Settings

    @classmethod
    def found(cls, folder: Path) -> Cluster:
        """The one that `up` left in `folder`. Raises ClusterError if there is none."""
        try:
            return cls(folder, settings.read(folder))
        except OSError:
            raise ClusterError(f"{folder}: no cluster was brought up there") from None

    # --- up and down --------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start everything and wait until every node is idle. It goes on with what `down` kept in the folder."""
        self._refuse()
        try:
            self._up()
        except BaseException:
            processes.end(self.folder)
            raise

    def _up(self) -> None:
        for name in ("log", "state", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._make_gpus()
        settings.write(self.settings, self.folder)
        self._start_munged()
        if self.settings.accounting == "dbd":
            self._start_accounting()
        self.start_controller()
        for name in self.settings.node_names:
            self._start_slurmd(name)
        self.wait_idle()

    def down(self, *, keep: bool = False) -> None:
        """End every process of the cluster, its jobs included, and remove its folder. keep: leave the folder."""
        if keep:  # each saves what it knows; the nodes and their jobs have nothing to save
            for part in ("slurmctld", "slurmdbd", "mariadbd"):
                processes.end(self.folder, part, sig=signal.SIGTERM)
        processes.end(self.folder)
        if not keep:
            shutil.rmtree(self.folder)

    def _refuse(self) -> None:
        if lack := lacking():
            raise ClusterError(f"no Slurm can be brought up here: {lack}")
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ClusterError(
                f"{self.folder}: longer than {LONGEST_FOLDER} characters, as paths of sockets must be short"
            )
        if processes.find(self.folder):
            raise ClusterError(f"{self.folder}: a cluster is up there; take it down first")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise ClusterError(f"{self.folder}: belongs to another user")

    def _make_gpus(self) -> None:
        """Slurm believes in a GPU whose file is a character device: these are /dev/null under other names."""
        for number in range(self.settings.gpus):
            file = self.folder / "gpu" / str(number)
            if not file.exists():
                os.mknod(file, 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        self._start("munged", [
            "munged", "--force",  # it would refuse a socket that only root can reach
            f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--seed-file={self.folder}/munge.seed",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/log/munged.log",
        ])  # fmt: skip

    def _start_accounting(self) -> None:
        """A MariaDB of its own that listens on a socket in the folder only, and slurmdbd on it."""
        data, sock = self.folder / "mysql", self.folder / "mysql.sock"
        if not (data / "mysql").is_dir():
            self._start("mariadb-install", [
                "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
                "--auth-root-authentication-method=socket",
            ])  # fmt: skip
        sock.unlink(missing_ok=True)
        self._start("mariadbd", [
            "setsid", "--fork", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}",
            f"--pid-file={self.folder}/mysql.pid", "--skip-networking", "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=2",
        ])  # fmt: skip
        self.wait(sock.exists, "mariadbd to listen")
        self._start("slurmdbd", ["slurmdbd"], MYSQL_UNIX_PORT=str(sock))
        self.wait(lambda: self._try("sacctmgr", "-n", "list", "cluster") is not None, "slurmdbd to answer")
        if not self.run("sacctmgr", "-n", "list", "cluster", "format=cluster").strip():
            self.run("sacctmgr", "-i", "add", "cluster", "dev")

    # --- its controller and its nodes ---------------------------------------------------------------------------------

    def start_controller(self) -> None:
        self._start("slurmctld", ["slurmctld"])
        self.wait(self.answers, "slurmctld to answer")

    def answers(self) -> bool:
        """Whether the controller does, within its own patience."""
        return "is UP" in (self._try("scontrol", "ping") or "")

    def stop_controller(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """TERM lets it save what it knows. After SIGKILL it may have forgotten the jobs of the last seconds."""
        processes.end(self.folder, "slurmctld", sig=sig)

    def restart_controller(self, sig: signal.Signals = signal.SIGTERM) -> None:
        self.stop_controller(sig)
        self.start_controller()

    def start_node(self, name: str) -> None:
        """Bring back a node that was killed, and wait until it may be used again."""
        self._known(name)
        if not processes.find(self.folder, name):
            self._start_slurmd(name)
        self.wait(lambda: self.node_states()[name] not in ("down", "unknown"), f"{name} to be back")

    def kill_node(self, name: str) -> None:
        """As a power cut would: slurmd, slurmstepd and tasks at once. The controller finds out after some seconds."""
        self._known(name)
        processes.end(self.folder, name)

    def node_tmp(self, name: str) -> Path:
        """The node's own temporary folder: TMPDIR of its tasks."""
        self._known(name)
        return self.folder / "nodes" / name / "tmp"

    def node_states(self) -> dict[str, str]:
        """What sinfo calls each node: idle, mixed, allocated, draining, down, ...; without its flags (`*` and such)."""
        lines = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return {name: state.rstrip("*~#!%$@^-") for name, _, state in (line.partition(" ") for line in lines)}

    def configure(self, **changes: Any) -> None:
        """Change settings of the running cluster. Its jobs stay, unless `proctrack` changes."""
        before = self.settings
        self.settings = replace(before, **changes)
        settings.write(self.settings, self.folder)
        self.restart_controller()
        self.run("scontrol", "reconfigure")
        if self.settings.proctrack != before.proctrack:
            for name in self.settings.node_names:
                self.kill_node(name)
                self._start_slurmd(name)

    def _start_slurmd(self, name: str) -> None:
        for folder in ("spool", "tmp"):
            (self.folder / "nodes" / name / folder).mkdir(parents=True, exist_ok=True)
        (self.folder / "nodes" / name / "tmp").chmod(0o1777)
        self._start(name, ["unshare", "--mount", "--uts", "sh", "-c", AS_A_NODE, "sh", name, f"{self.folder}/hosts"])

    def _known(self, name: str) -> None:
        if name not in self.settings.node_names:
            raise ClusterError(f"{name}: no such node; there are {', '.join(self.settings.node_names)}")

    # --- talking to it ------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to reach this cluster and no other."""
        return {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def run(self, *command: str) -> str:
        """What a command of Slurm's prints. Raises ClusterError if it fails."""
        done = self._call(command)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def cancel_all(self) -> None:
        """Cancel every job, whoever sent it, and wait until none is left."""

        def none_left() -> bool:
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self._call(("scancel", *jobs))
                self._kill_tasks()
            return not jobs

        self.wait(none_left, "the jobs to end")

    def _kill_tasks(self) -> None:
        """Also those that Slurm would not reach: with `pgid` what has left its task's process group."""
        for name in self.settings.node_names:
            for pid in processes.find(self.folder, name):
                with suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() not in ("slurmd", "slurmstepd"):
                        os.kill(pid, signal.SIGKILL)

    def wait_idle(self) -> None:
        """Until every node may be given to a job and has none (planned: one has been thought of for it)."""
        self.wait(lambda: set(self.node_states().values()) <= {"idle", "planned"}, "all nodes to be idle")

    def wait(self, true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Raises ClusterError, with the ends of the logs, if it does not come true in time."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = [f"--- {log}\n{processes.tail(log)}" for log in sorted((self.folder / "log").iterdir())]
                raise ClusterError("\n".join([f"not within {seconds:g} s: {what}", *logs]))
            time.sleep(0.05)

    def _try(self, *command: str) -> str | None:
        done = self._call(command)
        return done.stdout if done.returncode == 0 else None

    def _call(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env={**os.environ, **self.environment()}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip

    def _start(self, part: str, command: list[str], **environment: str) -> None:
        try:
            processes.start(self.folder, part, command, **self.environment(), **environment)
        except RuntimeError as error:
            raise ClusterError(str(error)) from None
