"""What a launcher does: render, submit, observe, cancel. Nothing more is known of a scheduler outside its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from model.contract import Attempt, Cause


class LaunchState(StrEnum):
    """What a launcher knows of an attempt now. UNKNOWN (it did not answer) decides nothing."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"  # it was there and is over
    ABSENT = "absent"  # nothing of that name is or, as far as the launcher remembers, was there
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Query:
    """One attempt to look up: by handle if it was launched, else by name, adopted only if run id and digest match."""

    run_dir: str
    run_id: str
    attempt: int
    launch_name: str
    digest: str
    handle: dict[str, Any] | None


@dataclass(frozen=True)
class Observation:
    """The answer to a query. `detail` is for a person: the queue's reason, the node, the pid.

    cause: what the scheduler's word for an end means, for an attempt that left no outcome; None: it says nothing.
    bad_nodes: hosts of it that are down or out of service. nodes: where it runs. starts_at: when the scheduler expects
    to start it, seconds since the epoch.
    """

    state: LaunchState
    handle: dict[str, Any] | None = None
    detail: str = ""
    cause: Cause | None = None
    bad_nodes: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    starts_at: float | None = None


class LaunchError(RuntimeError):
    """The launcher refused an attempt; the message says what to do."""


class UnansweredError(LaunchError):
    """The cluster did not answer a submit: it may have taken the attempt or not. It is looked up by its name."""


class Launcher(Protocol):
    def render(self, attempt: Attempt, digest: str) -> str:
        """What `submit` would send, as text. Pure: a dry run prints exactly this."""

    def submit(self, attempt: Attempt, digest: str) -> dict[str, Any]:
        """Start it and return its handle. Raises LaunchError."""

    def observe(self, queries: Sequence[Query]) -> list[Observation]:
        """One answer a query, in order, with one question to the cluster however many there are. Never raises for a
        cluster that does not answer: that is UNKNOWN."""

    def cancel(self, query: Query, *, hard: bool) -> None:
        """Ask it to seal and stop, or (`hard`) end all its processes at once. Nothing if it is gone."""

    def clear(self, queries: Sequence[Query]) -> None:
        """Of a run's closed attempts: take off the queue what waits there under their names (requeued by the site, or
        submitted twice). What runs is left alone: the agent that holds the claim is in its last act, any other finds
        the claim taken. Raises LaunchError if the cluster does not answer: they are named again later."""

    def usable_nodes(self, resources: Mapping[str, Any], exclude: Sequence[str]) -> int | None:
        """How many nodes could be given to an attempt with these `resources` of its phase, busy ones included, down and
        drained ones and `exclude` not. None: it does not say."""
