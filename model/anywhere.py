"""Data wherever it lies, a path or any URI that fsspec knows: the part of `model.storage` that reads it.

Asked once: who reads data has a patience of its own (`model.data.patience`).
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from model.contract import new_nonce
from model.store_errors import NO_SPACE, DiskFullError, StoreError, UnknownStoreError


def is_uri(path: str) -> bool:
    return "://" in path


@contextmanager
def foreign(uri: str, doing: str) -> Iterator[None]:
    """What a backend of fsspec raises becomes ours. Their errors carry no errno where the operating system's do."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # every backend has exceptions of its own
        raise _ours(_meant(error), uri, doing) from error


def _meant(error: Exception) -> BaseException:
    """The error itself. But fsspec calls a file on a web server not there whatever befell the request: then that."""
    cause = error.__cause__
    if cause is None or not isinstance(error, FileNotFoundError):
        return error
    from aiohttp import ClientConnectionError, ClientPayloadError, ClientResponseError  # slow to import

    if isinstance(cause, ClientResponseError):
        return error if cause.status in NOT_THERE else cause
    return cause if isinstance(cause, (ClientConnectionError, ClientPayloadError, TimeoutError)) else error


NOT_THERE, FORBIDDEN = (404, 410), (401, 403)
"""What a web server answers."""


def _ours(error: BaseException, uri: str, doing: str) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, f"no such file: {uri}")
    if isinstance(error, PermissionError):
        return StoreError(errno.EACCES, f"{doing} {uri}: {error.strerror or error}")
    if isinstance(error, OSError):
        return StoreError(error.errno or errno.EIO, f"{doing} {uri}: {error.strerror or error or type(error).__name__}")
    refused = "Credentials" in type(error).__name__ or getattr(error, "status", None) in FORBIDDEN
    return StoreError(errno.EACCES if refused else errno.EIO, f"{doing} {uri}: {type(error).__name__}: {error}")


S3 = ("s3://", "s3a://")

S3_OPTIONS: dict[str, dict[str, Any]] = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 20,
        "retries": {"total_max_attempts": 1},  # s3fs asks five times; this would be for each, and a minute each time
        "max_pool_connections": 64,
    }
}


def _system(uri: str) -> tuple[Any, str]:
    """The file system of a path or URI (one object for all that ask), and the path in it. Raises UnknownStoreError."""
    from fsspec.core import url_to_fs  # slow to import, and `dinoctl status` comes this way

    options = S3_OPTIONS if uri.startswith(S3) else {}
    try:
        found: tuple[Any, str] = url_to_fs(uri, **options)
    except NO_BACKEND as error:
        raise UnknownStoreError(errno.EPROTONOSUPPORT, f"{uri}: {error}. What can be read is {KNOWN}") from error
    return found


NO_BACKEND = (ValueError, ImportError)
"""What fsspec raises for no such scheme, and for one whose package is not installed."""

KNOWN = (
    "a path, s3://, https:// and http://, and any other URI of fsspec whose package is installed where dinoctl and "
    "its attempts run: gs:// with gcsfs, az:// with adlfs"
)


def unknown(uri: str) -> str:
    """Why nothing installed can read such a URI; "" if something can. Asks no store."""
    if uri.startswith(S3):
        return ""  # s3fs is always there, and slow to import
    from fsspec import get_filesystem_class  # slow to import, as above

    try:
        get_filesystem_class(uri.partition("://")[0].rpartition("::")[2])
    except NO_BACKEND as error:
        return str(error)
    return ""


def read_range(uri: str, start: int, length: int | None) -> bytes:
    """`length` bytes from `start` (to the end if None), fewer where the file ends before. Raises FileNotFoundError,
    StoreError."""
    with foreign(uri, "reading"):
        system, path = _system(uri)
        return bytes(system.cat_file(path, start=start, end=None if length is None else start + length))


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError, StoreError."""
    with foreign(uri, "looking at"):
        system, path = _system(uri)
        return int(system.size(path))


def modified(uri: str) -> float | None:
    """When a file was written, in seconds since the epoch; None of a store that does not say (HTTP's). Raises
    FileNotFoundError, StoreError."""
    with foreign(uri, "looking at"):
        system, path = _system(uri)
        try:
            return float(system.modified(path).timestamp())
        except NotImplementedError:
            return None


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


def fetch(uri: str, target: Path) -> None:
    """Copy what lies at a URI to the file `target`, whole or not at all; nothing if `target` is there already.

    Raises StoreError, DiskFullError.
    """
    if target.exists():
        return
    import fsspec  # slow to import, and `dinoctl status` comes this way

    temporary = target.parent / f".{target.name}.{new_nonce()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fsspec.open(uri, "rb") as source, temporary.open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 23)
        temporary.replace(target)
    except FileNotFoundError as error:
        meant = _meant(error)
        why = "there is no such file" if meant is error else meant
        raise StoreError(errno.ENOENT, f"fetching {uri}: {why}") from error
    except OSError as error:
        kind = DiskFullError if error.errno in NO_SPACE else StoreError
        raise kind(error.errno, f"fetching {uri}: {error.strerror or error}") from error
    except Exception as error:  # every backend of fsspec has exceptions of its own
        raise StoreError(errno.EINVAL, f"fetching {uri}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
