"""Work on many things side by side, for what releases the interpreter lock: decoding, and waiting for a store."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 4
"""Results of each thread that may wait: not all at once, as each that waits takes memory."""

ASYNCHRONOUS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""What other processes ask for; not the faults of a thread's own, which must still be told of."""

Tell = Callable[[int, int], None]
"""Told how many of how many are done."""


def untold(done: int, total: int) -> None:
    """A `Tell` for who does not want to know."""


A = TypeVar("A")
B = TypeVar("B")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def deaf() -> None:
    """No such signal is delivered to the calling thread, so that the main thread is woken by it: for pools' threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASYNCHRONOUS)


def in_threads(look: Callable[[A], B], values: Iterable[A], threads: int) -> Iterator[B]:
    """`look` at every value; results in the order of the values. Raises what `look` raised, at its place."""
    left, waiting = iter(values), deque[Future[B]]()
    with ThreadPoolExecutor(threads, initializer=deaf) as pool:
        try:
            waiting.extend(pool.submit(look, value) for value in islice(left, AHEAD * threads))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(look, value) for value in islice(left, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
