"""What an agent sees while its ranks run: requests to stop, pulses, deaths; and when it has to end them. No torch."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from model import config, contract, storage
from model.contract import Attempt, Cause, RankEnd
from model.endings import ranks, read_ends
from model.link import Link, say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LINGER_SECONDS = 10.0
"""How long the processes may take to leave once all ranks said how they ended, or one of them died."""
DUMP_SECONDS = 1.0
"""How long a hung rank gets to write its stacks."""


@dataclass
class Requests:
    """Signals that ask for a stop, counted as they come in through a socket that a selector can wait on."""

    inbox: socket.socket
    count: int = 0

    @staticmethod
    def install() -> Requests:
        inbox, outbox = socket.socketpair()
        inbox.setblocking(False)
        outbox.setblocking(False)
        signal.set_wakeup_fd(outbox.detach(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        return Requests(inbox)

    def read(self) -> None:
        try:
            self.count += len(self.inbox.recv(64))
        except BlockingIOError:
            return


@dataclass
class Watch:
    """What the agent has seen so far. All times are of the monotonic clock."""

    began: float
    asked: float | None = None  # when a stop was asked for
    pulses: dict[int, int] = field(default_factory=dict)
    pulse: float | None = None  # when a pulse was last seen
    waiting: dict[int, str] = field(default_factory=dict)  # ranks that wait for a batch, and where their images lie
    pids: dict[int, int] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)  # in the order of their deaths
    over: float | None = None  # since when the processes have had no reason to stay

    @property
    def first_dead(self) -> int | None:
        return self.dead[0] if self.dead else None

    def overstayed(self, now: float) -> bool:
        return self.over is not None and now - self.over > LINGER_SECONDS


def look(attempt: Attempt, watch: Watch, requests: Requests, selector: selectors.BaseSelector, seconds: float) -> None:
    """Wait up to `seconds` for a signal or a death, then take in what happened since the last look."""
    ended = [key for key, _ in selector.select(seconds) if key.fileobj is not requests.inbox]
    now = time.monotonic()
    requests.read()
    if requests.count and watch.asked is None:
        watch.asked = now
        contract.stop_file(attempt.launch_name).touch()
        say("asked to stop: the ranks seal a checkpoint and end")
    pulses = {rank: _modified(contract.pulse_file(attempt.launch_name, rank)) for rank in ranks(attempt)}
    if pulses != watch.pulses and any(pulses.values()):
        watch.pulses, watch.pulse = pulses, now
    watch.waiting = _waiting(attempt)
    watch.dead += _deaths(attempt, watch, selector, ended)
    if watch.over is None and _is_over(attempt, watch):
        watch.over = now


def _deaths(
    attempt: Attempt, watch: Watch, selector: selectors.BaseSelector, ended: list[selectors.SelectorKey]
) -> list[int]:
    """The ranks that died since the last look, first things first. Ranks that are new are watched from now on."""
    missed = []
    for rank in ranks(attempt):
        pid_file = contract.pid_file(attempt.launch_name, rank)
        if rank not in watch.pids and pid_file.exists():
            watch.pids[rank] = int(pid_file.read_text())
            if not watch_pid(selector, watch.pids[rank], rank):
                missed.append(rank)
    for key in ended:
        selector.unregister(key.fileobj)
        os.close(key.fd)
    seen = [key.data for key in ended if key.data is not None]  # in the kernel's order; torchrun has no rank
    if not missed:
        return seen
    # One that lived too short to be watched failed while starting: who left a word was the reason for the others.
    ends = read_ends(attempt)
    return sorted(seen + missed, key=lambda rank: ends[rank] is None)


def why_kill(health: config.Health, watch: Watch, requests: int, link: Link, now: float) -> RankEnd | None:
    """Why the agent has to end the processes now, if it has to. `requests` is how often a stop was asked for."""
    if link.closed:
        return RankEnd(cause=Cause.SUPERSEDED, message="the controller closed this attempt", step=None)
    if link.out_of_reach(now):
        message = f"the run directory has not answered for {now - link.reached:.0f} s: {link.said}"
        return RankEnd(cause=Cause.STORE_LOST, message=message, step=None)
    if requests > 1:
        return RankEnd(cause=Cause.UNSEALED, message="a second request to stop: ended at once, unsealed", step=None)
    if watch.asked is not None and watch.pulse is None:
        return RankEnd(cause=Cause.STOPPED, message="stopped before its first step", step=None)
    if watch.asked is not None and now - watch.asked > health.notice_seconds:
        message = f"the ranks did not seal within health.notice_seconds ({health.notice_seconds:g} s): ended, unsealed"
        return RankEnd(cause=Cause.UNSEALED, message=message, step=None)
    if now - (watch.began if watch.pulse is None else watch.pulse) > health.stall_seconds:
        return _stalled(health, watch)
    return None


def _stalled(health: config.Health, watch: Watch) -> RankEnd:
    """A loader that does not deliver is told from a step that does not end: other ranks wait for a starved one."""
    since = f"for health.stall_seconds ({health.stall_seconds:g} s)"
    if watch.waiting:
        rank, where = min(watch.waiting.items())
        message = f"rank {rank}: no batch {since}: the loader waits for {where or 'its images'}"
        return RankEnd(cause=Cause.DATA_STALLED, message=message, step=None)
    return RankEnd(cause=Cause.HUNG, message=f"no step {since}; the ranks' stacks are in their logs", step=None)


def _is_over(attempt: Attempt, watch: Watch) -> bool:
    """Whether nothing more is to come: all ranks have said how they ended, or one is dead before its work was done."""
    try:
        ends = read_ends(attempt)
    except storage.StoreError:  # it does not answer now; asked again at the next look
        return False
    well = {rank for rank, end in ends.items() if end is not None and end.cause in (Cause.DONE, Cause.STOPPED)}
    return None not in ends.values() or not well.issuperset(watch.dead)


def watch_pid(selector: selectors.BaseSelector, pid: int, rank: int | None) -> bool:
    """Have the selector report the end of a process (pidfd_open(2)). False if it has ended already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    selector.register(descriptor, selectors.EVENT_READ, rank)
    return True


def _modified(path: Path) -> int:
    """Time of the last touch, in ns, as the file system says it; only compared with itself. 0: never."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _waiting(attempt: Attempt) -> dict[int, str]:
    found = {}
    for rank in ranks(attempt):
        with suppress(FileNotFoundError):
            found[rank] = contract.waiting_file(attempt.launch_name, rank).read_text(errors="replace")
    return found


def dump_stacks(watch: Watch) -> None:
    """Have every rank that is left write its stacks into its log (faulthandler, registered by model.rank)."""
    for rank, pid in watch.pids.items():
        if rank not in watch.dead:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(DUMP_SECONDS)
