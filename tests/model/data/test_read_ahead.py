"""What is read ahead of the batches: in how many requests, how much of it at once, and what happens when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from model import storage
from model.data import patience
from model.data.read_ahead import Piece, ReadAhead, stretches

SIZE = 1000


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5000), st.integers(1, 300)), max_size=60))
def test_stretches_hold_every_piece_once_and_read_at_most_twice_what_is_wanted(
    asked: list[tuple[str, int, int]],
) -> None:
    pieces = {Piece(*one) for one in asked}
    found = stretches(pieces, longest=2000)
    assert sorted(piece for stretch in found for piece in stretch) == sorted(pieces)
    for stretch in found:
        assert len({piece.path for piece in stretch}) == 1
        whole = stretch[-1].end - stretch[0].start
        assert whole <= 2 * sum(piece.length for piece in stretch)
        assert whole <= 2000


def test_neighbours_are_one_request_and_far_ones_are_not() -> None:
    near = [Piece("a", start, 100) for start in (0, 150, 300)]
    far, other = Piece("a", 9000, 100), Piece("b", 100, 100)
    assert stretches([far, near[2], near[0], other, near[1], near[1]]) == [near, [far], [other]]


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the requests so far."""
    (tmp_path / "shard").write_bytes(bytes(number % 251 for number in range(100 * SIZE)))
    sizes: list[int] = []
    read = storage.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        sizes.append(length)
        return read(uri, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    return sizes


@pytest.fixture
def open_ahead() -> Iterator[Callable[..., ReadAhead]]:
    opened: list[ReadAhead] = []

    def make(*arguments: object, **named: object) -> ReadAhead:
        opened.append(ReadAhead(*arguments, **named))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_batches_take_what_was_read_and_nothing_is_read_twice(
    tmp_path: Path, requests: list[int], open_ahead: Callable[..., ReadAhead]
) -> None:
    shard = str(tmp_path / "shard")
    pieces = [Piece(shard, number * SIZE, SIZE) for number in (3, 0, 2, 1, 50, 51, 90, 7)]
    ahead = open_ahead(range(4), lambda clock: pieces[2 * clock : 2 * clock + 2], 100 * SIZE)
    whole = Path(shard).read_bytes()
    for clock in range(4):
        with ahead.batch(clock):
            for piece in pieces[2 * clock : 2 * clock + 2]:
                assert ahead.read(piece) == whole[piece.start : piece.end]
    assert sorted(requests) == [SIZE, 2 * SIZE, 8 * SIZE]  # 90; 50 and 51; 0 to 7, of which three are not wanted
    assert ahead.read(Piece(shard, 20, 7)) == whole[20:27]  # nobody expected it


def test_no_more_than_the_budget_is_wanted_at_once(
    tmp_path: Path, requests: list[int], open_ahead: Callable[..., ReadAhead]
) -> None:
    pieces = [Piece(str(tmp_path / "shard"), 2 * number * SIZE, SIZE) for number in range(40)]
    ahead = open_ahead(range(40), lambda clock: pieces[clock : clock + 1], 20 * SIZE)
    for clock in range(40):
        with ahead.batch(clock):
            ahead.read(pieces[clock])
            assert sum(one.wanted for one in ahead._rounds) <= 10 * SIZE


def test_a_batch_larger_than_the_budget_is_read_all_the_same(
    tmp_path: Path, requests: list[int], open_ahead: Callable[..., ReadAhead]
) -> None:
    pieces = [Piece(str(tmp_path / "shard"), number * SIZE, SIZE) for number in range(40)]
    ahead = open_ahead(range(4), lambda clock: pieces[10 * clock : 10 * clock + 10], SIZE)
    for clock in range(4):
        with ahead.batch(clock):
            assert {len(ahead.read(piece)) for piece in pieces[10 * clock : 10 * clock + 10]} == {SIZE}
    assert len(requests) == 4


def test_a_failure_comes_out_where_it_is_asked_for(
    tmp_path: Path, open_ahead: Callable[..., ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.0,))

    def pieces_of(clock: int) -> list[Piece]:
        if clock == 2:
            raise storage.StoreError(5, "no index")
        return [Piece(str(tmp_path / "nothing"), 0, 1)]

    ahead = open_ahead(range(4), pieces_of, 1)
    with pytest.raises(storage.StoreError, match="nothing"), ahead.batch(0):
        ahead.read(pieces_of(0)[0])
    with ahead.batch(1):
        pass
    with pytest.raises(storage.StoreError, match="no index"), ahead.batch(2):
        pass


def test_closing_does_not_wait_for_a_store_that_fails(
    tmp_path: Path, open_ahead: Callable[..., ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "WAITS", (600.0,))
    pieces = [Piece(str(tmp_path / "nothing"), 0, 1)]
    ahead = open_ahead(range(1), lambda clock: pieces, 100)
    with ahead.batch(0):
        threading.Timer(0.1, ahead.stop).start()
        with pytest.raises(storage.StoreError, match="nothing"):
            ahead.read(pieces[0])
