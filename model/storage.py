"""Files that are published once, read, listed and removed: the one door to the store of a run.

Today that store is a POSIX file system; a bucket comes with the checkpoints on S3, behind these same functions.
Paths are strings, as a URI would be.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from model.contract import new_nonce


class StoreError(OSError):
    """The store did not do what was asked; the message says what, where and, if known, why."""


class AlreadyPublished(StoreError):  # noqa: N818 - not an error of the store: somebody was first
    """The name is taken, by other bytes than ours."""


class DiskFullError(StoreError):
    """No space, or no quota, left."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, a file larger than the process may write (`ulimit -f`)."""


def is_uri(path: str) -> bool:
    return "://" in path


def local(path: str) -> Path:
    """`path` on this machine's file system. Raises StoreError for a bucket, which dinoctl cannot reach yet."""
    if is_uri(path):
        raise StoreError(f"{path}: a run on a bucket is not there yet; name a folder that all workers see")
    return Path(path)


@contextmanager
def _named(path: Path | str, doing: str) -> Iterator[None]:
    """Errors of the operating system under this block become ours, with the path and what was being done."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        kind = DiskFullError if error.errno in NO_SPACE else StoreError
        raise kind(error.errno, f"{doing} {path}: {error.strerror or error}") from error


def publish(path: str, data: bytes) -> None:
    """Create `path` with `data`, whole or not at all, on disk when this returns.

    The name is taken exclusively (link(2) never replaces). A retry that finds its own bytes there has succeeded.
    Raises AlreadyPublished if the name is taken by other bytes, DiskFullError, StoreError.
    """
    publish_pieces(path, [data])


def publish_pieces(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """As `publish`, for what is too large to be in memory twice: written piece by piece, as they come."""
    target = local(path)
    with _named(target, "publishing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{new_nonce()}.tmp"
        try:
            _write(temporary, pieces)
            try:
                os.link(temporary, target)
            except FileExistsError:
                if not filecmp.cmp(temporary, target, shallow=False):
                    raise AlreadyPublished(errno.EEXIST, f"{target} is there already") from None
        finally:
            temporary.unlink(missing_ok=True)
        sync_dir(target.parent)


def replace(path: str, data: bytes) -> None:
    """Write `path`, whole, over what is there. For what nobody decides by: heartbeats and caches."""
    target = local(path)
    with _named(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{new_nonce()}.tmp"
        try:
            _write(temporary, [data])
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (to the end if None). Raises FileNotFoundError if there is no such file."""
    if is_uri(path):
        local(path)  # says why not
    try:
        with open(path, "rb") as file:  # `status` reads thousands of small files
            if start:
                file.seek(start)
            return file.read(-1 if length is None else length)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"no such file: {path}") from error
    except OSError as error:
        raise StoreError(error.errno, f"reading {path}: {error.strerror or error}") from error


def fetch(uri: str, target: Path) -> None:
    """Copy what lies at a URI to the file `target`, whole or not at all; nothing if `target` is there already.

    Raises StoreError, DiskFullError.
    """
    if target.exists():
        return
    import fsspec  # slow to import, and `dinoctl status` comes this way

    with _named(uri, "fetching"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{new_nonce()}.tmp"
        try:
            with fsspec.open(uri, "rb") as source, temporary.open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 23)
            temporary.replace(target)
        except OSError:
            raise
        except Exception as error:  # every backend of fsspec has exceptions of its own
            raise StoreError(errno.EINVAL, f"fetching {uri}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def exists(path: str) -> bool:
    return local(path).exists()


def names(path: str) -> list[str]:
    """The names in a folder, sorted; none if it is not there. Half-written files are not shown."""
    try:
        with _named(path, "listing"):
            return sorted(name for name in os.listdir(local(path)) if not name.startswith("."))
    except StoreError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise


def remove(path: str) -> None:
    """Remove one file; nothing if it is not there."""
    target = local(path)
    with _named(target, "removing"):
        target.unlink(missing_ok=True)


def remove_tree(path: str) -> None:
    """Remove a folder and what is in it; nothing if it is not there. Two may remove it at the same time."""
    target = local(path)
    with _named(target, "removing"):
        while target.exists():
            with suppress(FileNotFoundError):  # the other one was first with a file: there is less to do
                shutil.rmtree(target)


# --- data, wherever it lies: a path or any URI that fsspec knows ------------------------------------------------------


@contextmanager
def foreign(uri: str, doing: str) -> Iterator[None]:
    """What a backend of fsspec raises becomes ours. Their errors carry no errno where the operating system's do."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"no such file: {uri}") from error
    except PermissionError as error:
        raise StoreError(errno.EACCES, f"{doing} {uri}: {error.strerror or error}") from error
    except OSError as error:
        raise StoreError(error.errno or errno.EIO, f"{doing} {uri}: {error.strerror or error}") from error
    except Exception as error:  # every backend has exceptions of its own
        number = errno.EACCES if "Credentials" in type(error).__name__ else errno.EIO
        raise StoreError(number, f"{doing} {uri}: {type(error).__name__}: {error}") from error


S3_OPTIONS: dict[str, dict[str, Any]] = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"total_max_attempts": 1},  # s3fs asks five times; this would be for each, and a minute each time
        "max_pool_connections": 64,
    }
}


def _system(uri: str) -> tuple[Any, str]:
    """The file system of a path or URI (one object for all that ask), and the path in it."""
    from fsspec.core import url_to_fs  # slow to import, and `dinoctl status` comes this way

    options = S3_OPTIONS if uri.startswith(("s3://", "s3a://")) else {}
    found: tuple[Any, str] = url_to_fs(uri, **options)
    return found


def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`, fewer where the file ends before. Raises FileNotFoundError, StoreError."""
    if not is_uri(uri):
        return read(uri, start, length)
    with foreign(uri, "reading"):
        system, path = _system(uri)
        return bytes(system.cat_file(path, start=start, end=start + length))


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, StoreError."""
    with foreign(uri, "looking at"):
        system, path = _system(uri)
        return int(system.size(path))


def matching(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; URIs where the pattern is one. Raises StoreError."""
    with foreign(pattern, "listing"):
        system, path = _system(pattern)
        return sorted(str(system.unstrip_protocol(one)) if is_uri(pattern) else str(one) for one in system.glob(path))


def put(file: Path, uri: str) -> None:
    """Copy a file of this machine to a URI, over what is there; on a bucket whole or not at all. Raises StoreError."""
    with foreign(uri, "writing"):
        system, path = _system(uri)
        system.makedirs(system._parent(path), exist_ok=True)
        system.put_file(str(file), path)


@contextmanager
def reading(uri: str) -> Iterator[BinaryIO]:
    """The file opened to be read and sought in. Raises FileNotFoundError, StoreError."""
    with foreign(uri, "reading"):
        system, path = _system(uri)
        opened = system.open(path, "rb")
    try:
        yield opened
    finally:
        opened.close()
