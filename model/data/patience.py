"""A store that fails or is slow is asked again, with back-off, and never counts as an unreadable image."""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from model.data.errors import StalledDataError
from model.storage import StoreError, UnknownStoreError

log = logging.getLogger(__name__)

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds between the tries: two minutes in all."""

LONGEST = 300.0
"""Seconds after which no other try begins: where a store takes connections and stays silent, a try is long."""

HOPELESS = (errno.EACCES, errno.EPERM)
"""Asking again does not help."""

T = TypeVar("T")


def patiently(ask: Callable[[], T], over: threading.Event | None = None) -> T:
    """What `ask` returns, tried again while it raises StoreError or FileNotFoundError (a network file system that is
    not mounted looks like that). Raises StalledDataError with the last try's reason, also once `over` is set: nobody
    needs it any more; UnknownStoreError at once, as no store has failed."""
    over = over or threading.Event()
    began = time.monotonic()
    for tries, wait in enumerate([*WAITS, None], 1):
        try:
            return ask()
        except UnknownStoreError:
            raise
        except (StoreError, FileNotFoundError) as error:
            hopeless = error.errno in HOPELESS or time.monotonic() - began > LONGEST
            if wait is None or hopeless or over.is_set():
                raise StalledDataError(error.errno, f"{error.strerror}, after {tries} tries") from error
            _say(f"{error.strerror}; again in {wait:g} s")
            over.wait(wait)
    raise AssertionError("the last try returns or raises")


_said = {"at": -math.inf}


def _say(text: str) -> None:
    """Once a second: when a store fails, it fails for all threads that read from it."""
    if time.monotonic() - _said["at"] >= 1.0:
        _said["at"] = time.monotonic()
        log.warning(text)
