"""Reading ahead: what the next batches take from tar shards is fetched before they ask for it.

The order of the data is known for all time, so nothing is guessed. Batches are taken together for as long as they fit
in the budget; what lies close together in a shard is one request; many requests are under way at once. So the latency
of a bucket costs nothing as long as the budget lasts, and where it holds a good part of the lanes' windows a request
brings many images.

    ahead = ReadAhead(clocks, pieces_of, budget)
    with ahead.batch(clock):            from here to the end what the batch takes is kept
        ahead.read(piece)
    ahead.stop(), ahead.close()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from model import storage
from model.data.patience import patiently
from model.data.threads import deaf

READERS = 32
"""Requests under way at once: at 20 ms each, 1,600 a second."""

STRETCH = 8 * 2**20
"""Bytes of one request at most, unless a single piece is larger."""

MOST_PIECES, MOST_BATCHES = 16_384, 256
"""In a round, so that the first batch does not wait for the planning of all too many tiny or distant images."""


@dataclass(frozen=True, order=True)
class Piece:
    """Bytes of a shard that are taken whole: an image, or a caption."""

    path: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def read_now(piece: Piece, over: threading.Event | None = None) -> bytes:
    """The bytes of a piece, fewer where the shard ends before. Raises StalledDataError if the store stays out of
    reach, or does not answer and `over` is set."""
    return patiently(partial(storage.read_range, piece.path, piece.start, piece.length), over)


def stretches(pieces: Iterable[Piece], longest: int = STRETCH) -> list[list[Piece]]:
    """The pieces in requests: neighbours in one, as long as no request brings more unwanted bytes than wanted ones."""
    found: list[list[Piece]] = []
    wanted = 0
    for piece in sorted(set(pieces)):
        last = found[-1] if found else None
        if last is not None and last[0].path == piece.path:
            whole = piece.end - last[0].start
            if whole <= min(longest, 2 * (wanted + piece.length)):
                last.append(piece)
                wanted += piece.length
                continue
        found.append([piece])
        wanted = piece.length
    return found


@dataclass
class _Round:
    """Batches that are read together."""

    clocks: set[int]  # those that are not made yet
    wanted: int  # bytes
    coming: dict[Piece, Future[dict[Piece, bytes]]] = field(default_factory=dict)


class ReadAhead:
    """Reads what batches take, round by round, `budget` bytes at most (or `least` batches, if that is more).

    `pieces_of(clock)` is what the batch at a clock takes, if all of it can be read; anything else is read when it is
    asked for. Safe to call from several threads.
    """

    def __init__(
        self, clocks: Iterable[int], pieces_of: Callable[[int], Sequence[Piece]], budget: int, least: int = 2
    ) -> None:
        self._clocks, self._pieces_of, self._least = iter(clocks), pieces_of, least
        self._left: tuple[int, Sequence[Piece]] | None = None  # the first batch of the next round
        self._most = budget // 2  # of wanted bytes: as many may lie between them
        self._rounds: list[_Round] = []
        self._changed = threading.Condition()
        self._failure: Exception | None = None  # what pieces_of raised: nothing is planned beyond
        self._planned = False
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead", initializer=deaf)
        self._planner = threading.Thread(target=self._plan, name="read-ahead-plan", daemon=True)
        self._planner.start()

    @contextmanager
    def batch(self, clock: int) -> Iterator[None]:
        """Around the making of the batch at a clock. Raises what finding out about its pieces raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._planned or self._over.is_set() or self._is_planned(clock))
            if self._failure is not None and not self._is_planned(clock):
                raise self._failure
        try:
            yield
        finally:
            with self._changed:
                for one in self._rounds:
                    one.clocks.discard(clock)
                self._rounds = [one for one in self._rounds if one.clocks]
                self._changed.notify_all()

    def read(self, piece: Piece) -> bytes:
        """The bytes of a piece, fewer where the shard ends before. Raises StoreError."""
        with self._changed:
            coming = next((one.coming[piece] for one in self._rounds if piece in one.coming), None)
        return read_now(piece) if coming is None else coming.result()[piece]

    def stop(self) -> None:
        """Ask a store that fails no more: who waits for it goes on with an error, or reads for itself."""
        with self._changed:
            self._over.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what is not begun, wait for what is."""
        self.stop()
        self._planner.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _is_planned(self, clock: int) -> bool:
        return any(clock in one.clocks for one in self._rounds)

    # What the planner's thread does.

    def _plan(self) -> None:
        deaf()
        while (following := self._next_round()) is not None:
            with self._changed:
                self._changed.wait_for(lambda: self._over.is_set() or self._has_room())
                if self._over.is_set():
                    return
                self._begin(*following)
                self._changed.notify_all()
        with self._changed:
            self._planned = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """A round is half of what may be wanted: one is taken from while another is read."""
        waiting = sum(len(one.clocks) for one in self._rounds)
        return waiting < self._least or sum(one.wanted for one in self._rounds) <= self._most // 2

    def _next_round(self) -> tuple[set[int], list[Piece]] | None:
        """The clocks of the next round and its pieces in the order in which they are wanted; None: all is read."""
        clocks: set[int] = set()
        pieces: list[Piece] = []
        size = 0
        while (batch := self._left or self._next_batch()) is not None:
            self._left = None
            size += sum(piece.length for piece in batch[1])
            full = size > self._most // 2 or len(pieces) > MOST_PIECES or len(clocks) == MOST_BATCHES
            if clocks and full:
                self._left = batch
                break
            clocks.add(batch[0])
            pieces += batch[1]
        return (clocks, pieces) if clocks else None

    def _next_batch(self) -> tuple[int, Sequence[Piece]] | None:
        clock = None if self._over.is_set() or self._failure else next(self._clocks, None)
        if clock is None:
            return None
        try:
            return clock, self._pieces_of(clock)
        except Exception as error:
            self._failure = error
            return None

    def _begin(self, clocks: set[int], pieces: list[Piece]) -> None:
        wanted = {piece: place for place, piece in reversed(list(enumerate(pieces)))}
        requests = sorted(stretches(pieces), key=lambda request: min(wanted[piece] for piece in request))
        begun = _Round(clocks, sum(piece.length for piece in pieces))
        for request in requests:
            future = self._pool.submit(_read_stretch, request, self._over)
            begun.coming |= dict.fromkeys(request, future)
        self._rounds.append(begun)


def _read_stretch(pieces: list[Piece], over: threading.Event) -> dict[Piece, bytes]:
    """One request for neighbours, ascending; what lies between them is let go."""
    first, end = pieces[0].start, max(piece.end for piece in pieces)
    data = read_now(Piece(pieces[0].path, first, end - first), over)
    if len(pieces) == 1:
        return {pieces[0]: data}
    return {piece: data[piece.start - first : piece.end - first] for piece in pieces}
