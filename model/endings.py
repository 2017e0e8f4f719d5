"""How an attempt ended: what its ranks said, and which of it is the cause. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from model import contract, nodes, storage
from model.contract import Attempt, Cause, Outcome, RankEnd, Step

TELLING = (
    Cause.SUPERSEDED,
    Cause.STORE_LOST,
    Cause.USER_ERROR,
    Cause.BAD_CHECKPOINT,
    Cause.BAD_DATA,
    Cause.DIVERGED,
    Cause.DISK_FULL,
    Cause.DATA_STALLED,
    Cause.UNSEALED,
)
"""Causes that only the rank in trouble can name, the most telling first: the others lost a peer and crashed."""

TAIL_BYTES = 4000
"""How much of a rank's log an outcome quotes."""


DETAIL_BYTES = 48_000
"""How much an outcome tells of logs: less than the room that is kept for it."""


def ranks(attempt: Attempt, node: int = 0) -> range:
    """The ranks on a node; an evaluation is one process."""
    each = 1 if attempt.phase == contract.EVALUATE else attempt.processes_per_node
    return range(node * each, (node + 1) * each)


def read_ends(attempt: Attempt, of: range) -> dict[int, RankEnd | None]:
    """What each of this node's ranks said: in its published file, else in its note on this machine, else nothing."""
    return {rank: _read_end(attempt, rank) for rank in of}


def published_ends(attempt: Attempt, of: range) -> dict[int, RankEnd | None]:
    """What ranks of a node said to everybody; nothing too where the store does not say."""
    ends: dict[int, RankEnd | None] = dict.fromkeys(of)
    with suppress(storage.StoreError):
        ends |= {rank: _first_there([_published(attempt, rank)]) for rank in of}
    return ends


def _published(attempt: Attempt, rank: int) -> str:
    return f"{attempt.run_dir}/{contract.rank_file(attempt.attempt, rank)}"


def _read_end(attempt: Attempt, rank: int) -> RankEnd | None:
    note, published = str(contract.end_file(attempt.launch_name, rank)), _published(attempt, rank)
    return _first_there([note] if storage.is_uri(published) else [published, note])  # a bucket is slow to ask


def _first_there(paths: Iterable[str]) -> RankEnd | None:
    for path in paths:
        try:
            return contract.decode(storage.read(path), RankEnd, path)
        except FileNotFoundError:
            continue
    return None


def nowhere(rank: int) -> str:
    """On which node a rank is, for a message: no word where there is but one."""
    return ""


def judge(
    ends: Mapping[int, RankEnd | None],
    first_dead: int | None,
    killed: RankEnd | None,
    oom: bool | None,
    on: Callable[[int], str] = nowhere,
) -> RankEnd:
    """The end of the attempt from the ends of its ranks.

    `first_dead`: the rank whose process ended first. `killed`: why the agent ended the processes, if it did; `ends` is
    then from before. `oom`: whether the kernel killed a process for lack of memory meanwhile (None: not known).
    A rank that died first and silently was killed; the peers that crash on the broken connection are its echo.
    """
    spoken = {rank: end for rank, end in ends.items() if end is not None}
    silent = sorted(rank for rank in ends if rank not in spoken)
    if not silent and all(end.cause in (Cause.DONE, Cause.STOPPED) for end in spoken.values()):
        return _first(spoken, Cause.STOPPED, on) or _one(spoken, Cause.DONE)
    for cause in TELLING:
        if end := _first(spoken, cause, on):
            return end
    if killed is not None and killed.cause is Cause.VANISHED:
        return killed
    if first_dead in silent:
        return _killed(first_dead, oom, on)
    if first_dead in spoken and spoken[first_dead].cause is Cause.CRASHED:
        return _named(first_dead, spoken[first_dead], on)
    if end := _first(spoken, Cause.CRASHED, on):
        return end
    if killed is not None:
        return killed
    if silent:
        return _killed(silent[0], oom, on)
    worst = min(rank for rank, end in spoken.items() if end.cause not in (Cause.DONE, Cause.STOPPED))
    return _named(worst, spoken[worst], on)


def most_telling(reasons: Iterable[RankEnd | None]) -> RankEnd | None:
    """Of several agents' reasons to end their ranks the one that the others follow from."""
    order = (*TELLING, Cause.VANISHED)
    there = [reason for reason in reasons if reason is not None]
    return min(there, key=lambda one: order.index(one.cause) if one.cause in order else len(order), default=None)


def _first(spoken: Mapping[int, RankEnd], cause: Cause, on: Callable[[int], str]) -> RankEnd | None:
    return next((_named(rank, end, on) for rank, end in sorted(spoken.items()) if end.cause is cause), None)


def _one(spoken: Mapping[int, RankEnd], cause: Cause) -> RankEnd:
    """What they all said: no rank's number, as it says nothing."""
    return next(end for _, end in sorted(spoken.items()) if end.cause is cause)


def _named(rank: int, end: RankEnd, on: Callable[[int], str]) -> RankEnd:
    return RankEnd(cause=end.cause, message=f"rank {rank}{on(rank)}: {end.message}", step=end.step, detail=end.detail)


def _killed(rank: int, oom: bool | None, on: Callable[[int], str]) -> RankEnd:
    memory = {
        True: "the kernel killed a process for lack of memory meanwhile: give it more, or a smaller micro-batch",
        False: "the kernel reports no lack of memory",
        None: "lack of memory is the usual reason: see `dmesg`",
    }[oom]
    message = f"rank {rank}{on(rank)} was killed by a signal and left no word ({memory})"
    return RankEnd(cause=Cause.KILLED, message=message, step=None)


def outcome(attempt: Attempt, end: RankEnd, logs: str, bad_nodes: list[str]) -> Outcome:
    """The attempt's last word, with the step from the progress and the `logs`' tails where `end` has neither."""
    well = end.cause in (Cause.DONE, Cause.STOPPED)
    return Outcome(
        cause=end.cause,
        message=end.message,
        step=end.step if end.step is not None else _last_step(attempt),
        detail=end.detail or ("" if well else logs[:DETAIL_BYTES]),
        ended_at=contract.now(),
        nonce=contract.new_nonce(),
        bad_nodes=bad_nodes,
    )


def _last_step(attempt: Attempt) -> int | None:
    """The last update that rank 0 recorded; None too where the store does not say."""
    folder = f"{attempt.run_dir}/{contract.progress_dir(attempt.attempt)}"
    with suppress(storage.StoreError):
        for name in reversed(storage.names(folder)):
            lines = storage.read(f"{folder}/{name}").splitlines()
            if lines:
                return contract.decode(lines[-1], Step, f"{folder}/{name}").step
    return None


def tails(attempt: Attempt, of: range) -> str:
    """The ends of the ranks' logs: the stacks of a hung rank, a fatal error that Python could not raise."""
    quoted = []
    for rank in of:
        path = f"{attempt.run_dir}/{contract.rank_log(attempt.attempt, rank)}"
        if tail := _tail(storage.local(path)):
            quoted.append(f"--- {path}\n{tail}")
    return "\n".join(quoted)


def _tail(path: Path) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return ""
    return storage.read(str(path), max(0, size - TAIL_BYTES)).decode(errors="replace")


OF_MACHINE = ("/proc/vmstat",)
OF_CONTAINER = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Where the kernel counts; of a container by the version of its cgroups, the second one first."""


def oom_kills() -> int | None:
    """Processes that the kernel has killed for lack of memory since boot, in a pod those of the pod; None where it does
    not tell."""
    for path in OF_CONTAINER if nodes.in_a_pod(os.environ) else OF_MACHINE:
        with suppress(OSError):
            lines = Path(path).read_text().splitlines()
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    return None
