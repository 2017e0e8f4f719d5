"""Reads what the attempts recorded, above all chunks of one line a step, `attempts/<n>/progress/<chunk>.jsonl`.

A chunk is published whole and never changes, so a reader remembers only how many it has read. Two attempts of a phase
may both have trained a step (the second resumed from a checkpoint before it); the step belongs to the later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from model import contract, storage
from model.contract import Step


@dataclass(frozen=True)
class Owned:
    """A step, and the attempt that it counts for."""

    attempt: int
    step: Step


def chunks(run_dir: str, attempt: int) -> list[int]:
    """The numbers of the chunks that an attempt has published, ascending."""
    names = storage.names(f"{run_dir}/{contract.progress_dir(attempt)}")
    stems = (name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def last_chunk(run_dir: str, attempt: int) -> int:
    """The number of the newest chunk, -1 if there is none.

    A bucket lists a thousand names at a time, and a week has more than a hundred thousand chunks; as their numbers are
    consecutive, it is asked for a few of them instead.
    """
    if not storage.is_uri(run_dir):
        return max(chunks(run_dir, attempt), default=-1)

    def is_there(chunk: int) -> bool:
        return storage.exists(f"{run_dir}/{contract.progress_chunk(attempt, chunk)}")

    there, beyond = -1, 1
    while is_there(beyond - 1):
        there, beyond = beyond - 1, 2 * beyond
    absent = beyond - 1
    while absent - there > 1:
        middle = (there + absent) // 2
        there, absent = (middle, absent) if is_there(middle) else (there, middle)
    return there


def read_chunk(run_dir: str, attempt: int, chunk: int) -> list[Step]:
    """The steps of one chunk. Raises contract.ContractError naming file and line if one is of another shape."""
    path = f"{run_dir}/{contract.progress_chunk(attempt, chunk)}"
    lines = storage.read(path).splitlines()
    return [contract.decode(line, Step, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def since(run_dir: str, attempt: int, last: int) -> Iterator[tuple[int, list[Step]]]:
    """Each chunk numbered above `last` (-1: all), with its steps; a reader keeps the number and asks again later.

    Numbers are consecutive from 0, so it asks for the next one until there is none: a week has too many to list.
    """
    while True:
        last += 1
        try:
            steps = read_chunk(run_dir, attempt, last)
        except FileNotFoundError:
            return
        yield last, steps


def latest(run_dir: str, attempt: int) -> Step | None:
    """The newest step that an attempt recorded; one chunk is read, however long the attempt has run."""
    for chunk in range(last_chunk(run_dir, attempt), -1, -1):
        steps = read_chunk(run_dir, attempt, chunk)
        if steps:
            return steps[-1]
    return None


def looked(run_dir: str, attempt: int) -> str:
    """How far an attempt was with its first look at the images, in words; "" where it had none to take, or not yet."""
    try:
        return storage.read(f"{run_dir}/{contract.looked_file(attempt)}").decode()
    except FileNotFoundError:
        return ""


def first(run_dir: str, attempts: Iterable[int]) -> Step | None:
    """The first step that any of these attempts recorded, in their order."""
    for attempt in attempts:
        for _, recorded in since(run_dir, attempt, -1):
            if recorded:
                return recorded[0]
    return None


def steps(run_dir: str, attempt: int) -> list[Step]:
    """All steps that an attempt recorded, those included that a later attempt trained again."""
    return [step for _, steps in since(run_dir, attempt, -1) for step in steps]


def merge(histories: Iterable[tuple[int, Sequence[Step]]]) -> list[Owned]:
    """One history of a phase out of its attempts' (attempt, steps), given in the order of the attempts.

    An attempt whose first recorded step is r + 1 went on from the state after r updates: earlier attempts keep their
    steps up to r, and what they recorded beyond is dropped.
    """
    merged: list[Owned] = []
    for attempt, recorded in histories:
        if not recorded:
            continue
        first = recorded[0].step
        while merged and merged[-1].step.step >= first:
            merged.pop()
        merged.extend(Owned(attempt, step) for step in recorded)
    return merged


def history(run_dir: str, attempts: Iterable[int]) -> list[Owned]:
    """The merged history of the `attempts` of one phase."""
    return merge((attempt, steps(run_dir, attempt)) for attempt in sorted(attempts))
