"""Which builder of images this machine has, if one works here: it has to reach the base image too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

FILE = Path(__file__).parents[1] / "images" / "Containerfile"


def there() -> str | None:
    """The command of a builder that can also run what it built; None if there is none, or it cannot pull the base."""
    base = re.search("^ARG BASE=(.+)$", FILE.read_text(), re.MULTILINE)
    assert base is not None
    for command in ("podman", "docker"):
        if shutil.which(command) and all(map(_goes, ([command, "info"], [command, "pull", base[1]]))):
            return command
    return None


def _goes(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
