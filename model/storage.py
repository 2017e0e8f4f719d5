"""Files that are published once, read, listed and removed: the one door to the store of a run.

The store is a POSIX file system, or an S3 bucket (`model.bucket`) for a path that begins with `s3://`; behind the same
functions. Data, which may lie at any other URI too, is read through the same door (`model.anywhere`).
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from model import anywhere, bucket, s3
from model.anywhere import KNOWN, S3_OPTIONS, fetch, foreign, is_uri, matching, put, reading, size, unknown
from model.contract import new_nonce, scratch_dir
from model.store_errors import NO_SPACE, AlreadyPublished, DiskFullError, NoAccessError, StoreError, UnknownStoreError

__all__ = [
    "KNOWN", "NO_SPACE", "S3_OPTIONS", "AlreadyPublished", "DiskFullError", "NoAccessError", "StoreError",
    "UnknownStoreError", "be_patient", "contents", "digest", "exists", "fetch", "foreign", "is_uri", "local",
    "local_file", "matching", "modified", "names", "own_scratch", "publish", "publish_many", "publish_pieces", "put",
    "read", "read_many", "read_range", "read_there", "reading", "remove", "remove_behind", "remove_folder_of",
    "remove_tree", "replace", "size", "sync_dir", "unknown",
]  # fmt: skip


def local(path: str) -> Path:
    """Where on this machine a file lies that only processes of this machine write: at `path` itself or, as a bucket
    knows no append and no lock, for a URI at a place of its own below the temporary folder."""
    if not is_uri(path):
        return Path(path)
    return scratch_dir(path.replace("://", "/", 1))  # no launch name has a slash


def local_file(path: str) -> Path:
    """`local`, with the folder made. Raises StoreError, also if our part of the temporary folder is another user's."""
    target = local(path)
    with _named(target, "making the folder of"):
        if is_uri(path):
            own_scratch()
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def own_scratch() -> None:
    """Make the folder of `contract.scratch_dir`, for this user alone: others write to the temporary folder too. Raises
    PermissionError if it is another's."""
    root = scratch_dir("")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(
            errno.EPERM, f"{root} belongs to another user; remove it, or set TMPDIR to a folder of yours"
        )


def be_patient(seconds: float) -> None:
    """How long this process asks a bucket again before it says that it failed. A disk is not asked again."""
    s3.PATIENCE.seconds = seconds


def _in_bucket(path: str) -> bool:
    """Whether a file of a run lies in a bucket. Raises StoreError for a URI at which no run can lie."""
    if is_uri(path) and not s3.is_ours(path):
        raise StoreError(errno.EINVAL, f"{path}: a run lies in a folder, or in an S3 bucket: s3://BUCKET/PREFIX")
    return is_uri(path)


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
    if _in_bucket(path):
        bucket.publish(path, pieces)
        return
    target = Path(path)
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


def publish_many(files: Mapping[str, bytes]) -> None:
    """`publish` each, in a bucket many at once. Raises as `publish`; some may then be there."""
    if any(map(_in_bucket, files)):
        bucket.publish_many(files)
        return
    for path, data in files.items():
        publish(path, data)


def replace(path: str, data: bytes) -> None:
    """Write `path`, whole, over what is there. For what nobody decides by: heartbeats and caches."""
    if _in_bucket(path):
        bucket.replace(path, data)
        return
    target = Path(path)
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
    """`length` bytes from `start` (to the end if None). Raises FileNotFoundError, StoreError."""
    if is_uri(path):
        return bucket.read(path, start, length) if s3.is_ours(path) else anywhere.read_range(path, start, length)
    try:
        with open(path, "rb") as file:  # `status` reads thousands of small files
            if start:
                file.seek(start)
            return file.read(-1 if length is None else length)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"no such file: {path}") from error
    except OSError as error:
        raise StoreError(error.errno, f"reading {path}: {error.strerror or error}") from error


def read_range(path: str, start: int, length: int) -> bytes:
    """As `read`, for data at any URI, asked for once."""
    return anywhere.read_range(path, start, length) if is_uri(path) else read(path, start, length)


def read_many(paths: Sequence[str]) -> list[bytes]:
    """`read` each whole, in a bucket many at once."""
    if any(map(_in_bucket, paths)):
        return bucket.read_many(paths)
    return [read(path) for path in paths]


def read_there(folder: str) -> dict[str, bytes]:
    """The files of a folder, each whole, by path; what is removed meanwhile is left out."""
    found = {}
    for path in [f"{folder}/{name}" for name in names(folder)]:
        with suppress(FileNotFoundError):
            found[path] = read(path)
    return found


def exists(path: str) -> bool:
    return bucket.exists(path) if _in_bucket(path) else Path(path).exists()


def modified(path: str) -> float:
    """When a file was written, in seconds since the epoch. Raises FileNotFoundError, StoreError."""
    return bucket.modified(path) if _in_bucket(path) else Path(path).stat().st_mtime


def written(path: str) -> float | None:
    """As `modified`, of a file anywhere; None where the store does not say."""
    return anywhere.modified(path) if is_uri(path) and not _in_bucket(path) else modified(path)


def names(path: str) -> list[str]:
    """The names in a folder, sorted; none if it is not there. Half-written files are not shown."""
    if _in_bucket(path):
        return bucket.names(path)
    try:
        with _named(path, "listing"):
            return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except StoreError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise


def remove(path: str) -> None:
    """Remove one file; nothing if it is not there."""
    if _in_bucket(path):
        bucket.remove(path)
        return
    target = Path(path)
    with _named(target, "removing"):
        target.unlink(missing_ok=True)


def remove_tree(path: str) -> None:
    """Remove a folder and what is in it; nothing if it is not there. Two may remove it at the same time."""
    if _in_bucket(path):
        bucket.remove_tree(path)
        return
    target = Path(path)
    with _named(target, "removing"):
        while target.exists():
            with suppress(FileNotFoundError):  # the other one was first with a file: there is less to do
                shutil.rmtree(target)


def remove_folder_of(first: str, but: Collection[str] = (), unless: Callable[[], bool] = lambda: False) -> bool:
    """Remove the folder that the file `first` lies in, that file before all others, so that whatever dies halfway
    leaves nothing that looks whole. `but`: paths of files in it that stay. Returns whether `first` is gone.

    unless: asked once `first` is gone; if it says so, `first` is put back and nothing is removed. Whoever lays claim to
    the folder and then still finds `first` in it is thus sure to keep it.
    """
    folder = os.path.dirname(first)
    try:
        was = read(first)
    except FileNotFoundError:  # somebody got this far and died
        was = None
    remove(first)
    if was is not None and unless():
        publish(first, was)
        return False
    for path in (f"{folder}/{name}" for name in names(folder)):
        if path not in but:
            remove(path)
    if not but:
        remove_tree(folder)
    return True


def remove_behind(notes: Collection[str], files: Collection[str], unless: Callable[[], bool]) -> bool:
    """Remove files once empty `notes` are published which say that they are gone, so that whoever misses a file finds
    out that it was meant to go. Returns whether they are gone.

    unless: asked once the notes are there; if it says so, those that were made here are taken back and nothing is
    removed. Whoever lays claim to the files and then finds no note is thus sure to keep them.
    """
    made = [note for note in notes if not exists(note)]
    for note in made:
        publish(note, b"")
    if unless():
        for note in made:
            remove(note)
        return False
    for file in files:
        remove(file)
    return True


# --- whole folders ----------------------------------------------------------------------------------------------------


def contents(folder: str) -> dict[str, bytes]:
    """Every file below a folder by its relative path, in their order; hidden ones and Python's caches left out."""
    if _in_bucket(folder):
        inside = bucket.tree(folder)
    else:
        inside = sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())
    kept = [name for name in inside if "__pycache__" not in (parts := name.split("/")) and parts[-1][:1] != "."]
    return dict(zip(kept, read_many([f"{folder}/{name}" for name in kept]), strict=True))


def digest(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents: the same files anywhere have the same digest, whatever their times and modes."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode())
        total.update(files[name])
    return total.hexdigest()
