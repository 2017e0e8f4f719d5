"""While the images of a run are looked at for the first time, which may take hours and is no step.

A rank says how far it is: in its log now and then, rank 0 also in the run's directory, for who watches the run; and to
the agent each time, which would take it for hung otherwise.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from model import contract, parallel, storage

log = logging.getLogger(__name__)

SAY_SECONDS = 10.0
"""Between two lines of the log; the last of all is always written."""

ROUND_SECONDS = 5.0
"""Between two words to the other ranks."""

LOOKING, READY = "looking", "ready"


class Looking:
    """Told what is done, how much of it, and of how many: `looking("looked at %s of %s images", 3, 7)`."""

    def __init__(self, attempt: contract.Attempt, rank: int) -> None:
        self._file = contract.looking_file(attempt.launch_name, rank)
        self._words = f"{attempt.run_dir}/{contract.looked_file(attempt.attempt)}" if rank == 0 else ""
        self._said = time.monotonic()
        self._file.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Raises storage.StoreError if the run's directory does not take it."""
        now = time.monotonic()
        if 0 < done == total or now - self._said >= SAY_SECONDS:
            self._said = now
            words = what % (f"{done:,}", f"{total:,}")
            log.info("%s", words)
            if self._words:
                storage.replace(self._words, words.encode())
        self._file.touch()


class LookingForAll(Looking):
    """As rank 0 looks, while the others are in `wait_for_rank_0`: each node has an agent that would call its own ranks
    hung, and a collective waits for half an hour at most."""

    def __init__(self, attempt: contract.Attempt) -> None:
        super().__init__(attempt, rank=0)
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
