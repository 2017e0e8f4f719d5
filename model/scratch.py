"""Between the agent of a node and its ranks: files on the node's own disk, as a bucket is too slow to ask every step.
Part of `model.contract`, through which everybody comes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def scratch_dir(launch_name: str) -> Path:
    """The node-local folder of one attempt; the launch name is its own, so nothing stale can be there."""
    return Path(tempfile.gettempdir()) / f"dinoctl-{os.getuid()}" / launch_name


def stop_file(launch_name: str) -> Path:
    """The agent makes it to ask its ranks to seal and stop; each rank looks at every step."""
    return scratch_dir(launch_name) / "stop"


def pulse_file(launch_name: str, rank: int) -> Path:
    """A rank touches it at every step; the agent calls the attempt hung when none was touched for too long."""
    return scratch_dir(launch_name) / f"pulse-{rank}"


def looking_file(launch_name: str, rank: int) -> Path:
    """A rank touches it, before its first step, whenever it looked at one more image or shard for the index."""
    return scratch_dir(launch_name) / f"looking-{rank}"


def waiting_file(launch_name: str, rank: int) -> Path:
    """There while a rank waits for a batch; it says where the images lie."""
    return scratch_dir(launch_name) / f"waiting-{rank}"


def pid_file(launch_name: str, rank: int) -> Path:
    """A rank's pid, written before anything of the trainer is imported: whom to ask for stacks, and who died first."""
    return scratch_dir(launch_name) / f"pid-{rank}"


def end_file(launch_name: str, rank: int) -> Path:
    """A RankEnd by `model.rank`, for a rank that failed and could not publish its own (its disk may be full)."""
    return scratch_dir(launch_name) / f"end-{rank}.json"
