"""What can be wrong with the images.

DataError            the folder or the settings ask for something impossible: a user error
BadDataError         more unreadable images than `data.max_skip_rate`
UnreadableImageError one image cannot be used; caught where images are counted, never seen by a user as such
"""

from __future__ import annotations

from model import contract


class DataError(ValueError):
    """The folder or the settings ask for something impossible; the message says what to do."""


class BadDataError(RuntimeError):
    """More of the images are unreadable than `data.max_skip_rate` allows; the message names some."""


class UnreadableImageError(Exception):
    """One image cannot be used; the text is the reason, without the path."""


class Skipped(contract.Record, frozen=True):
    """One image, or the rest of a shard, that cannot be read."""

    path: str
    reason: str
