"""Signals that ask an attempt to stop: who takes them, and how many requests they are. No torch.

The agent takes them all. Some schedulers send them to every process of a job: those below the agent are deaf to them.
"""

from __future__ import annotations

import select
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends as its notice, and again before its SIGKILL: all of them together are one request of its."""

DUMP_SIGNAL = signal.SIGRTMIN + 3
"""The agent's to its ranks, which write their stacks into their logs: none that a scheduler sends."""


@dataclass
class Requests:
    """Requests to stop, counted as they come in through a socket that a selector can wait on.

    `scheduled`: a scheduler started this process and ends it after its notice by itself, so that only a person's SIGINT
    asks again. Elsewhere each signal is a request, and the second one asks for an end at once.
    """

    inbox: socket.socket
    outbox: socket.socket
    scheduled: bool = False
    heard: Counter[int] = field(default_factory=Counter)

    @staticmethod
    def install(scheduled: bool = False) -> Requests:
        inbox, outbox = socket.socketpair()
        inbox.setblocking(False)
        outbox.setblocking(False)
        signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        return Requests(inbox, outbox, scheduled)

    @property
    def count(self) -> int:
        notices = sum(self.heard[number] for number in NOTICES)
        return self.heard[signal.SIGINT] + (min(notices, 1) if self.scheduled else notices)

    def read(self) -> None:
        with suppress(BlockingIOError):
            self.heard.update(number for number in self.inbox.recv(4096) if number in STOP_SIGNALS)

    def wake(self) -> None:
        """Have whoever waits look again. From any thread."""
        with suppress(BlockingIOError):  # full: it wakes anyway
            self.outbox.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Until a signal comes or somebody wakes, at most `seconds`."""
        select.select([self.inbox], [], [], seconds)
        self.read()


@contextmanager
def held() -> Iterator[None]:
    """Signals that come in this block are delivered after it. A process started in it begins deaf to them, and calls
    `be_deaf`: there is no moment at which one could end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def be_deaf() -> None:
    """Ignore what asks for a stop, as all processes do that this one starts: the agent asks in its own way."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
