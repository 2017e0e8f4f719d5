"""The captions that a text phase's tokenizer is learnt from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_CAPTIONS = 16_384
"""Where each has to be fetched: spread evenly over all."""


@dataclass(frozen=True)
class Captions:
    """`identity`: equal for equal captions, and known without reading them."""

    identity: str
    read: Callable[[], Sequence[str]]
