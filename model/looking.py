"""While the images of a run are looked at for the first time, which may take hours and is no step.

A rank says how far it is: in its log now and then, and to the agent each time, which would take it for hung otherwise.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from model import parallel

log = logging.getLogger(__name__)

SAY_SECONDS = 10.0
"""Between two lines of the log; the last of all is always written."""

ROUND_SECONDS = 5.0
"""Between two words to the other ranks."""

LOOKING, READY = "looking", "ready"


class Looking:
    """Told what is done, how much of it, and of how many: `looking("looked at %s of %s images", 3, 7)`."""

    def __init__(self, file: Path) -> None:
        """`file`: touched each time (`contract.looking_file`)."""
        self._file = file
        self._said = time.monotonic()
        file.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if 0 < done == total or now - self._said >= SAY_SECONDS:
            self._said = now
            log.info(what, f"{done:,}", f"{total:,}")
        self._file.touch()


class LookingForAll(Looking):
    """As rank 0 looks, while the others are in `wait_for_rank_0`: each node has an agent that would call its own ranks
    hung, and a collective waits for half an hour at most."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._round = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        super().__call__(what, done, total)
        if time.monotonic() - self._round >= ROUND_SECONDS:
            parallel.gather_text(LOOKING)
            self._round = time.monotonic()

    def ready(self) -> None:
        parallel.gather_text(READY)


def wait_for_rank_0(file: Path) -> None:
    """Until it is ready. `file` is touched whenever it says that it goes on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while parallel.gather_text("")[0] != READY:
        file.touch()
