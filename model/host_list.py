"""Lists of hosts as Slurm writes them. Part of `model.contract`, through which everybody comes."""

from __future__ import annotations

import re
from itertools import product


def hosts(nodes: str) -> list[str]:
    """`rack[1-2]n[01-03],login` as a list of hosts; none for what Slurm says where there are none."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes):
        pieces = re.split(r"(\[[^\]]*\])", part)
        found += map("".join, product(*(_expanded(piece) for piece in pieces)))
    return [host for host in found if host not in ("", "None assigned", "(null)")]


def _expanded(piece: str) -> list[str]:
    if not piece.startswith("["):
        return [piece]
    numbers: list[str] = []
    for part in piece.strip("[]").split(","):
        low, _, high = part.partition("-")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    return numbers
