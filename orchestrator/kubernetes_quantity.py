"""Amounts as Kubernetes writes them."""

from __future__ import annotations

import re

FACTORS = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip

WRITTEN = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([numkMGTPE]?i?)")


def number(text: str) -> float:
    """500m is 0.5, 64Gi is 2**36. Raises ValueError."""
    found = WRITTEN.fullmatch(str(text))
    if found is None or found[2] not in FACTORS:
        raise ValueError(f"not an amount as Kubernetes writes it: {text}")
    return float(found[1]) * FACTORS[found[2]]
