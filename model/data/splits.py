"""Which split an image belongs to: a hash of its name, so that it never moves."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

TEST_SHARE, VALIDATION_SHARE = 1 / 3, 0.15
SPLIT_KEY = b"dinoctl split 1"  # a constant: a split that moved with the seed would leak from one seed to the next

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

HIDDEN: dict[str, tuple[Split, ...]] = {"none": (), "test": ("test",), "validation": ("validation", "test")}
"""`data.hold_out` -> the splits that training does not see."""


def split_of(name: str) -> Split:
    """The split of a name: in a folder the path of a group of near-duplicates' first member, in tar shards a sample's
    key."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=SPLIT_KEY).digest()
    point = int.from_bytes(digest, "little") / 2**64
    if point < TEST_SHARE:
        return "test"
    return "validation" if point < TEST_SHARE + VALIDATION_SHARE else "train"
