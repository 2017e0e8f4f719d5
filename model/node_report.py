"""What `model.doctor` finds out on a node, as `dinoctl doctor` reads it; and what it is asked. A part of
`model.contract`."""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of these records."""


class Ask(Part, frozen=True):
    """`ask.json`, in the folder that the nodes are to share."""

    nodes: int
    bytes: int  # that each node writes
    patience: float  # seconds that a node waits for another or for an answer
    tries: dict[str, list[str]]  # commands to run on each node, by name


class Try(Part, frozen=True):
    """A command's exit code, and the end of what it printed. None: it did not end, or is not there."""

    code: int | None
    said: str


class NodeReport(Part, frozen=True):
    """`node-<i>.json`. What could not be found out is None, and `errors` say why."""

    node: int
    host: str
    python: str
    user: int | None = None  # that the checks ran as
    winners: list[int] | None = None  # of each race for one name: the node whose bytes lie there
    wins: list[int] = []  # the races that this node was told it had won
    write_mb_s: float | None = None  # with fsync, while the other nodes wrote too
    clock: tuple[float, float] | None = None  # how far the clock of who asked is ahead, at least and at most
    torch: str | None = None
    cuda: str | None = None  # the version that torch is built for
    gpus: list[str] = []
    tries: dict[str, Try] = {}
    reached: list[str] | None = None  # the other nodes, by the names under which they were reached
    errors: list[str] = []


class ReduceReport(Part, frozen=True):
    """`reduce.json`, by rank 0 of an all-reduce over all processes."""

    ranks: int
    backend: str
    right: bool
    bytes: int
    seconds: float  # of one, on average


ASK_FILE, REDUCE_FILE = "ask.json", "reduce.json"


def node_file(node: int) -> str:
    return f"node-{node}.json"


def clock_file(node: int) -> str:
    """Published by a node that asks for the time; the answer lies beside it."""
    return f"clock-{node}"


def answer_file(node: int) -> str:
    return f"clock-{node}.answer"
