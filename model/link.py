"""An agent's link to the store of its run, a thread of its own: a store that is slow or away never keeps the agent from
its signals and its ranks. No torch.

It asks whether the attempt was closed and, in a bucket, renews the claim and brings the logs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from model import contract, storage
from model.contract import Attempt

OUT_OF_REACH_SECONDS = 120.0
"""How long an attempt may go on out of reach of its store. Longer than a rank asks again before it fails, so that it is
the rank that says what was refused."""

CHUNK_BYTES = 4 << 20

OTHERS_SECONDS = 10.0
"""How often an agent looks that is not node 0's, which tells it what matters: a bucket is asked by all of them."""


@dataclass
class Logs:
    """The logs that the processes of an attempt write on this machine, as numbered chunks in a bucket, which knows no
    append: `log/<file>/<chunk>`. On a disk they lie in the run directory, and there is nothing to bring."""

    attempt: Attempt
    sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # file -> chunks, bytes

    @property
    def target(self) -> str:
        return f"{self.attempt.run_dir}/{contract.log_dir(self.attempt.attempt)}"

    def ship(self) -> None:
        """Publish what is new. Raises StoreError; the next call goes on where this one failed."""
        if not storage.is_uri(self.target):
            return
        for file in sorted(storage.local(self.target).glob("*.log")):
            while self._chunk(file):
                pass

    def forget(self) -> None:
        """Remove what was brought."""
        if storage.is_uri(self.target):
            attempt = contract.attempt_dir(self.attempt.attempt)
            storage.remove_tree(str(storage.local(f"{self.attempt.run_dir}/{attempt}")))

    def _chunk(self, file: Path) -> bool:
        chunk, start = self.sent.get(file.name, (0, 0))
        data = storage.read(str(file), start, CHUNK_BYTES)
        if not data:
            return False
        name = f"{self.target}/{file.name}/{chunk:06d}"
        try:
            storage.publish(name, data)
        except storage.AlreadyPublished:  # by a try of ours that was given up: the file has grown since
            data = storage.read(name)
        self.sent[file.name] = chunk + 1, start + len(data)
        return True


@dataclass
class Link:
    """`closed`: the controller has ended the attempt. `reached`: when the store last answered (monotonic clock)."""

    attempt: Attempt
    logs: Logs
    leads: bool = True  # it is node 0's
    closed: bool = False
    said: str = ""  # why it did not answer
    reached: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @staticmethod
    def open(attempt: Attempt, leads: bool = True) -> Link:
        link = Link(attempt, Logs(attempt), leads)
        link.thread = threading.Thread(target=link._run, name="link to the store", daemon=True)
        link.thread.start()
        return link

    def out_of_reach(self, now: float) -> bool:
        return now - self.reached > OUT_OF_REACH_SECONDS

    def shut(self) -> None:
        """End the thread, and bring what is left of the logs."""
        self.over.set()
        if self.thread is not None:
            self.thread.join()
        try:
            self.logs.ship()
            self.logs.forget()
        except OSError as error:
            say(f"the end of the logs stays on {contract.hostname()}, {storage.local(self.logs.target)}: {error}")

    def _run(self) -> None:
        every = self.attempt.watch_seconds
        while not self.over.wait(every if self.leads else max(every, OTHERS_SECONDS)):
            try:
                self.closed = self.closed or closed(self.attempt)
                self._renew_claim()
                self.logs.ship()
                self.reached = time.monotonic()
                self.said = ""
            except OSError as error:
                if str(error) != self.said:
                    say(str(error))
                self.said = str(error)

    def _renew_claim(self) -> None:
        """For who looks from another machine into a bucket: its holder was there when the claim was last written. On a
        disk whoever looks is mostly on the same machine, and sees the process."""
        if self.leads and storage.is_uri(self.attempt.run_dir) and not self.closed:
            claim = f"{self.attempt.run_dir}/{contract.claim_file(self.attempt.attempt)}"
            storage.replace(claim, storage.read(claim))


def closed(attempt: Attempt) -> bool:
    """Whether the controller has ended this attempt. Raises OSError if the store does not say."""
    return storage.exists(f"{attempt.run_dir}/{contract.closed_file(attempt.attempt)}")


_also: list[int] = []
"""Descriptors beside this process's output to which `say` says it."""


def say(text: str) -> None:
    """One line for agent.log, which is this process's output."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    with suppress(OSError):  # a full disk must not end the agent: the outcome and the exit code say it too
        print(line, flush=True)
    for descriptor in _also:
        with suppress(OSError):
            os.write(descriptor, f"{line}\n".encode())


def keep_log(attempt: Attempt, node: int) -> None:
    """From now on the output of this process and of those it starts goes to its log in the run directory, as nobody
    else sends a pod's there; what is said goes to the pod's own output too. Where that cannot be, all stays as it is.
    """
    own = os.dup(1)
    try:
        log_to(storage.local_file(f"{attempt.run_dir}/{contract.agent_log(attempt.attempt, node)}"))
    except OSError as error:
        say(f"no log in the run directory: {error}")
        os.close(own)
    else:
        _also.append(own)


def log_to(path: Path) -> None:
    """Send what this process prints, C libraries included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
