"""What an agent sees while its ranks run: requests to stop, pulses, deaths; and when it has to end them. No torch."""

from __future__ import annotations

import os
import selectors
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from model import config, contract, storage
from model.contract import Attempt, Cause, RankEnd
from model.endings import read_ends
from model.link import Link, say
from model.signals import DUMP_SIGNAL
from model.team import Team

LINGER_SECONDS, LINGER_FAILED_SECONDS = 10.0, 2.0
"""How long the processes may take to leave once all ranks said how they ended, and once one of them died before: the
others then have to say what they know of it, and wait for it in vain."""
STILL_SECONDS = 5.0
"""How much longer than asked a wait may take before it is this process that stood still (SIGSTOP, a frozen disk)."""
DUMP_SECONDS = 1.0
"""How long a hung rank gets to write its stacks."""


@dataclass
class Watch:
    """What the agent has seen so far. All times are of the monotonic clock."""

    began: float  # or when a rank last looked at an image for the index, which is before the first step
    ranks: range = range(1)  # those of this node
    host: str = ""  # this node, for messages; empty where there is but one
    asked: float | None = None  # when a stop was asked for
    pulses: dict[int, int] = field(default_factory=dict)
    pulse: float | None = None  # when a pulse was last seen
    looks: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, str] = field(default_factory=dict)  # ranks that wait for a batch, and where their images lie
    pids: dict[int, int] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)  # in the order of their deaths
    over: float | None = None  # since when the processes have had no reason to stay
    failed: bool = False  # one died before its work was done
    looked: float = 0.0  # when the last look ended

    def overstayed(self, now: float) -> bool:
        return self.over is not None and now - self.over > (LINGER_FAILED_SECONDS if self.failed else LINGER_SECONDS)

    def later(self, seconds: float) -> None:
        """Take all of it to have happened that much later: time in which this process stood still is nobody's fault."""
        self.began += seconds
        self.asked = None if self.asked is None else self.asked + seconds
        self.pulse = None if self.pulse is None else self.pulse + seconds
        self.over = None if self.over is None else self.over + seconds


def look(attempt: Attempt, watch: Watch, team: Team, selector: selectors.BaseSelector, seconds: float) -> None:
    """Wait up to `seconds` for a signal, a word or a death, then take in what happened since the last look."""
    requests = team.requests
    ended = [key for key, _ in selector.select(seconds) if key.fileobj is not requests.inbox]
    now = time.monotonic()
    requests.read()
    if team.asked and watch.asked is None:
        watch.asked = now
        contract.stop_file(attempt.launch_name).touch()
        say("asked to stop: the ranks seal a checkpoint and end")
    pulses = {rank: _modified(contract.pulse_file(attempt.launch_name, rank)) for rank in watch.ranks}
    if pulses != watch.pulses and any(pulses.values()):
        watch.pulses, watch.pulse = pulses, now
    looks = {rank: _modified(contract.looking_file(attempt.launch_name, rank)) for rank in watch.ranks}
    if looks != watch.looks:
        watch.looks = looks
        watch.began = now if any(looks.values()) else watch.began
    watch.waiting = _waiting(attempt, watch.ranks)
    watch.dead += _deaths(attempt, watch, selector, ended)
    team.share(watch.dead)
    watch.failed = watch.failed or team.failed()
    if watch.over is None and (watch.failed or _is_over(attempt, watch)):
        watch.over = now


def stood_still(watch: Watch, link: Link, seconds: float) -> None:
    """After each look of `seconds`: a job that was suspended meanwhile is neither hung nor out of reach."""
    now, before = time.monotonic(), watch.looked
    watch.looked = now
    if before and (missed := now - before - seconds) > STILL_SECONDS:
        say(f"this process stood still for {missed:.0f} s: they do not count")
        watch.later(missed)
        link.reached += missed


def _deaths(
    attempt: Attempt, watch: Watch, selector: selectors.BaseSelector, ended: list[selectors.SelectorKey]
) -> list[int]:
    """The ranks that died since the last look, first things first. Ranks that are new are watched from now on."""
    missed = []
    for rank in watch.ranks:
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
    ends = read_ends(attempt, watch.ranks)
    return sorted(seen + missed, key=lambda rank: ends[rank] is None)


def why_kill(
    health: config.Health, watch: Watch, requests: int, link: Link, now: float, leads: bool = True
) -> RankEnd | None:
    """Why the agent has to end the processes now, if it has to. `requests` is how often a stop was asked for; `leads`:
    it is node 0's, as one alone has to say that there was no step to seal."""
    if link.closed:
        return RankEnd(cause=Cause.SUPERSEDED, message="the controller closed this attempt", step=None)
    if link.out_of_reach(now):
        message = f"the run directory has not answered for {now - link.reached:.0f} s: {link.said}"
        return RankEnd(cause=Cause.STORE_LOST, message=message, step=None)
    if requests > 1:
        return RankEnd(cause=Cause.UNSEALED, message="a second request to stop: ended at once, unsealed", step=None)
    if watch.asked is not None and watch.pulse is None and leads:
        return RankEnd(cause=Cause.STOPPED, message="stopped before its first step", step=None)
    if watch.asked is not None and now - watch.asked > health.notice_seconds:
        message = f"the ranks did not seal within health.notice_seconds ({health.notice_seconds:g} s): ended, unsealed"
        return RankEnd(cause=Cause.UNSEALED, message=message, step=None)
    if now - (watch.began if watch.pulse is None else watch.pulse) > health.stall_seconds:
        return stalled(health, watch)
    return None


def stalled(health: config.Health, watch: Watch) -> RankEnd:
    """A loader that does not deliver is told from a step that does not end: other ranks wait for a starved one."""
    since = f"for health.stall_seconds ({health.stall_seconds:g} s)"
    if watch.waiting:
        rank, where = min(watch.waiting.items())
        message = f"rank {rank}{_on(watch)}: no batch {since}: the loader waits for {where or 'its images'}"
        return RankEnd(cause=Cause.DATA_STALLED, message=message, step=None)
    message = f"no step{_on(watch)} {since}; the ranks' stacks are in their logs"
    return RankEnd(cause=Cause.HUNG, message=message, step=None)


def _on(watch: Watch) -> str:
    return f" on {watch.host}" if watch.host else ""


def _is_over(attempt: Attempt, watch: Watch) -> bool:
    """Whether nothing more is to come: all ranks have said how they ended, or (noted) one is dead before its work was
    done."""
    try:
        ends = read_ends(attempt, watch.ranks)
    except storage.StoreError:  # it does not answer now; asked again at the next look
        return False
    well = {rank for rank, end in ends.items() if end is not None and end.cause in (Cause.DONE, Cause.STOPPED)}
    watch.failed = not well.issuperset(watch.dead)
    return watch.failed or None not in ends.values()


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


def _waiting(attempt: Attempt, ranks: range) -> dict[int, str]:
    found = {}
    for rank in ranks:
        with suppress(FileNotFoundError):
            found[rank] = contract.waiting_file(attempt.launch_name, rank).read_text(errors="replace")
    return found


def dump_stacks(watch: Watch) -> None:
    """Have every rank that is left write its stacks into its log (faulthandler, registered by model.rank)."""
    for rank, pid in watch.pids.items():
        if rank not in watch.dead:
            with suppress(ProcessLookupError):
                os.kill(pid, DUMP_SIGNAL)
    time.sleep(DUMP_SECONDS)
