"""The files of a folder of images, read whole: a file that is at fault is told from a store that fails.

A store that fails is asked again (`model.data.patience`), as for tar shards, and in the end it is the store's failure.
What is the matter with one file makes one image unreadable: it was deleted, may not be read, is no file but a pipe, or
larger than any image.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from model.data.errors import UnreadableImageError
from model.data.patience import patiently
from model.storage import StoreError

GONE = (errno.ENOENT, errno.ENOTDIR)
FORBIDDEN = (errno.EACCES, errno.EPERM)
MISPLACED = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What may be the matter with one file. Any other number is the store's, or this machine's."""


LARGEST = 2**30
"""Bytes of a file: more than any image takes that is not refused for its pixels (`images.MAX_PIXELS` of four channels
of 16 bits, uncompressed, are 683 MiB). Each thread that looks at images may have one in memory."""


def read(path: Path, root: Path) -> bytes:
    """The bytes of a file under the folder `root`.

    Raises UnreadableImageError if the file is gone, may not be read, is no file or too large, while `root` is there.
    Where `root` itself is gone, or empty as the place of a file system that is not mounted, StalledDataError, as for a
    store that fails.
    """
    return patiently(partial(_read, path, root))


def head(path: Path, most: int) -> bytes | None:
    """The first `most` bytes of a file that may not be there; None then. Raises as `read`."""
    return patiently(partial(_head, path, most))


def failed(error: OSError, doing: str, path: str | Path) -> StoreError:
    """The error as the store's, with what was being done."""
    return StoreError(error.errno or errno.EIO, f"{doing} {path}: {error.strerror or error}")


def walk(root: Path, cannot: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `root` on with the names of its files, sorted; hidden ones left out. `cannot` is told why a
    folder cannot be listed.

    Links to folders are followed, but for one to a folder that the way to it leads through. `orchestrator.data_places`
    walks in the same way.
    """
    left: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(root), frozenset())]
    while left:
        place, above = left.pop()
        try:
            found = os.stat(place)
            if (found.st_dev, found.st_ino) in above:
                continue
            with os.scandir(place) as entries:
                listed = sorted((one.name, _is_folder(one)) for one in entries if not one.name.startswith("."))
        except OSError as error:
            cannot(error)
            continue
        yield place, [name for name, is_folder in listed if not is_folder]
        here = above | {(found.st_dev, found.st_ino)}
        left += [(os.path.join(place, name), here) for name, is_folder in reversed(listed) if is_folder]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link whose end may not be looked at is taken for what its name looks like: a file's has an ending."""
    try:
        return entry.is_dir()
    except OSError as error:
        return error.errno in FORBIDDEN and not os.path.splitext(entry.name)[1]


def _read(path: Path, root: Path) -> bytes:
    try:
        return _bytes(path)
    except OSError as error:
        if error.errno not in GONE + FORBIDDEN + MISPLACED:
            raise failed(error, "reading", path) from error
        if not _holds_something(root):
            missing = f"{error.strerror}, and {root} is empty, not there or closed to us: is it mounted?"
            raise StoreError(error.errno, f"reading {path}: {missing}") from error
        raise UnreadableImageError(error.strerror or str(error)) from error


def _head(path: Path, most: int) -> bytes | None:
    try:
        return _bytes(path, most)
    except OSError as error:
        if error.errno in GONE:
            return None
        if error.errno in FORBIDDEN + MISPLACED:
            raise UnreadableImageError(error.strerror or str(error)) from error
        raise failed(error, "reading", path) from error


def _bytes(path: Path, most: int = -1) -> bytes:
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImageError("not a file but a pipe, a device or the like")
        if most < 0 and found.st_size > LARGEST:
            raise UnreadableImageError(
                f"a file of {found.st_size:,} bytes, more than {LARGEST:,}: save one image a file, or cut it into tiles"
            )
        try:
            return file.read(most)
        except MemoryError as error:
            raise UnreadableImageError("not enough memory to read it") from error


def _at_once(path: str, flags: int) -> int:
    """Opens it; a pipe would otherwise be waited for until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _holds_something(root: Path) -> bool:
    try:
        with os.scandir(root) as found:
            return next(found, None) is not None
    except OSError:
        return False
