"""A run's directory as the controller sees it: the event log, the heartbeats of those who watch, and its proof.

The log is one file an event, published exclusively under consecutive numbers: of two controllers that append at once
one is refused, reads again and decides again.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator, Sequence

import msgspec

from model import storage
from model.contract import (
    EVENTS_DIR,
    FORMAT,
    WATCHERS_DIR,
    ContractError,
    Watcher,
    boot_id,
    decode,
    encode,
    event_file,
    hostname,
    new_nonce,
)
from orchestrator import events
from orchestrator.events import Event

_EVENT_NAME = re.compile(r"(\d{6,})\.json")
LIST_AGAIN = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between two listings while a number is missing: a store may show a later file before an earlier one."""


DAMAGED = (
    "Restore that file from a backup, or begin a new run with what the old one has trained: "
    "`weights: RUN/checkpoints/PHASE/ATTEMPT/STEP` in its first phase"
)
"""A fork would have to read the log."""


FOLDER = ".dinoctl"
"""In a folder of runs, hidden: the heartbeats of those who watch all of them."""


class LogError(RuntimeError):
    """The log cannot be read, or the store is not fit to hold one; the message says what to do."""


class Conflict(RuntimeError):  # noqa: N818 - not an error: somebody appended first
    """Another controller appended under this number: read again and decide again."""


class _Head(msgspec.Struct, frozen=True):
    """What even a newer format's first event says."""

    format: int
    version: str


def append(run_dir: str, number: int, event: Event) -> None:
    """Publish `event` as number `number` (the first is 1). Raises Conflict if the number is taken."""
    try:
        storage.publish(f"{run_dir}/{event_file(number)}", events.encode(event))
    except storage.AlreadyPublished as error:
        raise Conflict(f"{run_dir}: event {number} is there already") from error


def read(run_dir: str, pauses: Sequence[float] | None = None) -> list[Event]:
    """All events in order; none if there is no run. Raises LogError for a gap that stays or for a newer format.

    pauses: between the listings that a gap is given to close; LIST_AGAIN if None.
    """
    number_of = count(run_dir, pauses)
    if number_of == 0:
        return []
    paths = [f"{run_dir}/{event_file(number)}" for number in range(1, number_of + 1)]
    found = _contents(run_dir, paths)
    for path, data in zip(paths, found, strict=True):
        _check_whole(data, path)
    _check_format(found[0], paths[0])
    return [events.decode(data, path) for path, data in zip(paths, found, strict=True)]


def count(run_dir: str, pauses: Sequence[float] | None = None) -> int:
    """How many events there are. Raises LogError for a gap that stays."""
    return _complete(run_dir, LIST_AGAIN if pauses is None else pauses)


_seen: dict[str, list[bytes]] = {}
"""Of runs in buckets, the events that this process has read: they never change, and each is a request."""


def _contents(run_dir: str, paths: list[str]) -> list[bytes]:
    if not storage.is_uri(run_dir):
        return storage.read_many(paths)
    known = _seen.get(run_dir, [])[: len(paths)]
    first, *new = storage.read_many([paths[0], *paths[max(1, len(known)) :]])
    if known[:1] != [first]:  # another run has been made under that name
        known = [first]
        new = storage.read_many(paths[1:])
    _seen[run_dir] = [*known, *new]
    return _seen[run_dir]


def _check_whole(data: bytes, path: str) -> None:
    """Events are published whole: one that is no JSON was cut or overwritten since, and no version can read it."""
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise LogError(
            f"{path}: torn: {len(data)} bytes are no whole event ({error}); the log is damaged. {DAMAGED}"
        ) from error


def has_events(run_dir: str) -> bool:
    """Whether there is a run at all; whatever else lies in that folder makes none."""
    return bool(_numbers(run_dir))


def _numbers(run_dir: str) -> set[int]:
    matches = map(_EVENT_NAME.fullmatch, storage.names(f"{run_dir}/{EVENTS_DIR}"))
    return {int(match[1]) for match in matches if match}


@functools.lru_cache(16)
def _expected(count: int) -> list[str]:
    return sorted(os.path.basename(event_file(number)) for number in range(1, count + 1))


def _complete(run_dir: str, pauses: Sequence[float]) -> int:
    """How many events there are, once their numbers have no gap."""
    missing = 0
    names = storage.names(f"{run_dir}/{EVENTS_DIR}")
    if names == _expected(len(names)):  # as nearly always
        return len(names)
    for pause in (*pauses, None):
        numbers = _numbers(run_dir)
        last = max(numbers, default=0)
        if len(numbers) == last:
            return last
        missing = next(number for number in range(1, last + 1) if number not in numbers)
        if pause is not None:
            time.sleep(pause)
    raise LogError(
        f"{run_dir}: {event_file(missing)} is missing though later events are there; the log is damaged. {DAMAGED}"
    )


def _check_format(first: bytes, where: str) -> None:
    try:
        head = msgspec.json.decode(first, type=_Head)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise LogError(f"{where}: not the first event of a run: {error}") from error
    if head.format > FORMAT:
        raise LogError(
            f"{where}: this run was written by dinoctl {head.version} (format {head.format}); this dinoctl reads "
            f"formats up to {FORMAT}. Use dinoctl {head.version} or newer"
        )


def prove(run_dir: str) -> None:
    """Show on the store itself that a name can be taken only once. Raises LogError if the store lets it be taken twice,
    or takes nothing at all.

    Without that, two controllers could both believe that they launched an attempt.
    """
    path = f"{run_dir}/proof-{new_nonce()}"
    try:
        storage.publish(path, b"first")
    except (storage.DiskFullError, storage.NoAccessError):
        raise
    except storage.StoreError as error:
        if storage.is_uri(run_dir):
            raise
        raise LogError(
            f"a run cannot be written to {run_dir}: {os.strerror(error.errno or 0)}. "
            "Choose a folder that this user may write to: --runs DIR, DINOCTL_RUNS or `runs` in the job"
        ) from error
    try:
        try:
            storage.publish(path, b"second")
        except storage.AlreadyPublished:
            if storage.read(path) == b"first":
                return
        raise LogError(
            f"{run_dir}: this store lets a second writer take a file's name, so the log of a run is not safe there. "
            "Put the run on a file system with hard links or on a bucket with conditional writes"
        )
    finally:
        storage.remove(path)


# --- who watches ------------------------------------------------------------------------------------------------------


def heartbeat(run_dir: str, watcher: Watcher) -> None:
    """Note that `watcher` has just looked, and forget those that are gone and those that nobody can read.

    This note is newer than theirs, so "nobody watches, since ..." can still be said from it.
    """
    mine = _watcher_name(watcher)
    for name, other in _watchers(run_dir):
        if name != mine and (isinstance(other, ContractError) or not is_alive(other, watcher.seen_at)):
            storage.remove(f"{run_dir}/{WATCHERS_DIR}/{name}")
    storage.replace(f"{run_dir}/{WATCHERS_DIR}/{mine}", encode(watcher))


def watchers(run_dir: str, *, of_folder: bool = False) -> list[Watcher]:
    """All heartbeats that can be read, the newest first; `is_alive` says which of them still watch.

    of_folder: also those of who watches all runs of its folder (`orchestrator.many`). They count for a cluster's runs
    alone: one of this machine launches the next attempt where it is.
    """
    places = (run_dir, f"{os.path.dirname(run_dir)}/{FOLDER}") if of_folder else (run_dir,)
    readable = [watcher for place in places for _, watcher in _watchers(place) if isinstance(watcher, Watcher)]
    return sorted(readable, key=lambda watcher: -watcher.seen_at)


def unreadable_watchers(run_dir: str) -> list[str]:
    """What is wrong with each heartbeat that cannot be read; the next one of anybody removes it."""
    return [str(error) for _, error in _watchers(run_dir) if isinstance(error, ContractError)]


def is_alive(watcher: Watcher, now: float) -> bool:
    """Whether it still watches: it looked lately and, on this machine, its process is there. `every` 0: looked once."""
    if watcher.every <= 0 or now - watcher.seen_at > max(3 * watcher.every, 10.0):
        return False
    return process_is_there(watcher.host, watcher.boot_id, watcher.pid, watcher.started) is not False


def surely_watches(watcher: Watcher, since: float, now: float) -> bool:
    """Whether it can be counted on: its process is there or, on another machine, it has looked after `since`. One that
    looked before may have died right after."""
    there = process_is_there(watcher.host, watcher.boot_id, watcher.pid, watcher.started)
    return is_alive(watcher, now) and (there is True or watcher.seen_at >= since)


def process_is_there(host: str, boot: str, pid: int, started: float) -> bool | None:
    """Whether that very process still runs; None if it is of another machine and cannot be seen from here."""
    if host != hostname():
        return None
    if boot != boot_id():
        return False
    import psutil  # here, as only few commands need it

    try:
        return abs(float(psutil.Process(pid).create_time()) - started) < 2.0
    except psutil.NoSuchProcess:
        return False


def _watchers(run_dir: str) -> Iterator[tuple[str, Watcher | ContractError]]:
    """By file name. A torn one is given as what is wrong with it: who watches decides nothing that a run computes."""
    for name in storage.names(f"{run_dir}/{WATCHERS_DIR}"):
        path = f"{run_dir}/{WATCHERS_DIR}/{name}"
        try:
            data = storage.read(path)
        except FileNotFoundError:  # another heartbeat has just removed it
            continue
        try:
            yield name, decode(data, Watcher, path)
        except ContractError as error:
            yield name, error


def _watcher_name(watcher: Watcher) -> str:
    return f"{watcher.host}-{watcher.pid}-{int(watcher.started)}.json"
