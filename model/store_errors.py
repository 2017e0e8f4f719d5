"""What goes wrong with a store: the exceptions of `model.storage`, which is where everybody else has them from."""

from __future__ import annotations

import errno


class StoreError(OSError):
    """The store did not do what was asked; the message says what, where and, if known, why."""


class AlreadyPublished(StoreError):  # noqa: N818 - not an error of the store: somebody was first
    """The name is taken, by other bytes than ours."""


class DiskFullError(StoreError):
    """No space, or no quota, left."""


class NoAccessError(StoreError):
    """Credentials, permissions or the bucket itself are missing: asking again does not help."""


class UnknownStoreError(StoreError):
    """A URI of a kind that nothing installed here can read: asking again does not help."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, a file larger than the process may write (`ulimit -f`)."""
