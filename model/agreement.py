"""What the ranks settle with each other on the host, through the rendezvous store: no collective, no device.

One of them says it, the others wait for that; a thread that waits can also be told to leave it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch.distributed.distributed_c10d import Store

from model import parallel

LONGEST_PAUSE = 0.05
"""Seconds between two looks, once one has waited for a while; the first come at once."""


def agreed(store: Store, key: str, decide: Callable[[], str]) -> str:
    """What rank 0 decides, on every rank. Each rank calls it once for a key; the others wait for rank 0."""
    if parallel.rank() == 0:
        store.set(key, decide())
    else:
        wait_for(store, [key])
    return str(store.get(key).decode())


def wait_for(store: Store, keys: Iterable[str], enough: Callable[[], bool] = lambda: False) -> bool:
    """Wait until all of `keys` are in the store, or until `enough()`. Returns whether they are all there.

    By looking again and again: a blocking wait would keep every other thread from the store's one connection.
    """
    pause, wanted = 0.001, list(keys)
    while not store.check(wanted):
        if enough():
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)
    return True


def first(store: Store, key: str, text: str) -> str:
    """What whichever rank came first said under `key`: `text`, if that was this one."""
    return str(store.compare_set(key, "", text).decode())
