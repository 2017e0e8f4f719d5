"""A dev cluster never outlives the tests that brought it up, however those end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLUSTERS = Path(__file__).parents[1] / "clusters" / "dev"


@contextmanager
def guarded(kind: str, folder: Path) -> Iterator[None]:
    """Should this process be killed, the end of a pipe from it takes the cluster in `folder` down. kind: slurm or
    kubernetes, whose `down` that is."""
    once_alone = ["sh", "-c", 'read _; exec "$@"', "sh", CLUSTERS / kind / "down", "--folder", folder]
    guard = subprocess.Popen(once_alone, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    with guard:
        yield
        guard.kill()  # nothing is left for it to do
