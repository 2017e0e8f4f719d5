"""What can be wrong with the images.

DataError            the folder or the settings ask for something impossible: a user error
BadDataError         more unreadable images than `data.max_skip_rate`
StalledDataError     the store of the images failed, or was silent, for minutes
UnreadableImageError one image cannot be used; caught where images are counted, never seen by a user as such
"""

from __future__ import annotations

from model import contract, storage


class DataError(ValueError):
    """The folder or the settings ask for something impossible; the message says what to do."""


class BadDataError(RuntimeError):
    """More of the images are unreadable than `data.max_skip_rate` allows; the message names some."""


class StalledDataError(storage.StoreError):
    """The store of the images failed, or was silent, however often it was asked; the message says where and why."""


class UnreadableImageError(Exception):
    """One image cannot be used; the text is the reason, without the path."""


class Skipped(contract.Record, frozen=True):
    """One image, or the rest of a shard, that cannot be read."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
