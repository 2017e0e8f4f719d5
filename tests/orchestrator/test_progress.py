"""The merged history of a phase: each step from the attempt that owned it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from model import contract, storage
from model.contract import Step
from orchestrator import progress
from orchestrator.progress import Owned


def step(number: int, loss: float = 0.0, note: str = "") -> Step:
    return Step(step=number, steps=100, time=1000.0 + number, images_per_second=9.0, metrics={"loss": loss}, note=note)


def record(run: Path, attempt: int, chunk: int, steps: list[Step]) -> None:
    data = b"".join(contract.encode(s) + b"\n" for s in steps)
    storage.publish(f"{run}/{contract.progress_chunk(attempt, chunk)}", data)


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    assert progress.latest(str(tmp_path), 1) is None
    assert progress.steps(str(tmp_path), 1) == []
    assert progress.history(str(tmp_path), [1, 2]) == []


def test_latest_reads_the_newest_chunk_alone(tmp_path: Path) -> None:
    record(tmp_path, 1, 0, [step(1), step(2)])
    record(tmp_path, 1, 1, [step(3), step(4)])
    (tmp_path / contract.progress_chunk(1, 0)).write_text("torn")
    assert progress.latest(str(tmp_path), 1) == step(4)


def test_chunks_are_read_in_numeric_order_and_only_once(tmp_path: Path) -> None:
    for chunk in (0, 1, 2):
        record(tmp_path, 3, chunk, [step(chunk + 1)])
    assert [number for number, _ in progress.since(str(tmp_path), 3, -1)] == [0, 1, 2]
    assert list(progress.since(str(tmp_path), 3, 1)) == [(2, [step(3)])]
    assert list(progress.since(str(tmp_path), 3, 2)) == []


def test_half_written_chunks_are_not_seen(tmp_path: Path) -> None:
    record(tmp_path, 1, 0, [step(1)])
    (tmp_path / contract.progress_dir(1) / ".000001.jsonl.abc.tmp").write_text("{")
    assert progress.chunks(str(tmp_path), 1) == [0]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / contract.progress_chunk(1, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(contract.encode(step(1)) + b'\n{"step": 2}\n')
    with pytest.raises(contract.ContractError, match=r"000000\.jsonl:2: not a Step"):
        progress.steps(str(tmp_path), 1)


def test_a_resumed_attempt_owns_what_it_trained_again(tmp_path: Path) -> None:
    record(tmp_path, 1, 0, [step(n, loss=1.0) for n in (1, 2, 3, 4, 5)])
    record(tmp_path, 2, 0, [step(n, loss=2.0) for n in (4, 5, 6)])
    merged = progress.history(str(tmp_path), [2, 1])
    assert [(owned.attempt, owned.step.step) for owned in merged] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert [owned.step.metrics["loss"] for owned in merged] == [1, 1, 1, 2, 2, 2]


def test_what_an_attempt_reached_beyond_a_later_ones_start_is_dropped(tmp_path: Path) -> None:
    """Attempt 1 reached 5, attempt 2 resumed from 2 and died at 3: steps 4 and 5 are not part of the run any more."""
    merged = progress.merge([(1, [step(n) for n in (1, 2, 3, 4, 5)]), (2, [step(3)])])
    assert [(owned.attempt, owned.step.step) for owned in merged] == [(1, 1), (1, 2), (2, 3)]


def test_an_attempt_that_recorded_nothing_changes_nothing() -> None:
    assert progress.merge([(1, [step(1)]), (2, []), (3, [step(2)])]) == [Owned(1, step(1)), Owned(3, step(2))]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=6))
def test_however_often_killed_the_history_has_each_step_once(tries: list[tuple[int, int]]) -> None:
    histories: list[tuple[int, list[Step]]] = []
    reached = 0
    for attempt, (back, length) in enumerate(tries, 1):
        resumed = max(0, reached - back)
        reached = resumed + length
        histories.append((attempt, [step(n, loss=float(attempt)) for n in range(resumed + 1, reached + 1)]))
    merged = progress.merge(histories)
    assert [owned.step.step for owned in merged] == list(range(1, reached + 1))
    assert all(owned.step.metrics["loss"] == owned.attempt for owned in merged)
