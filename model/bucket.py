"""A run's files in an S3 bucket: what `model.storage` promises of a disk, there.

Nothing is cached, and a name is taken with `If-None-Match`. A request that was carried out though its answer was lost
is refused when `model.s3` makes it again; what lies there is then read back, and our own bytes mean that we succeeded.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import chain
from typing import Any, TypeVar

from model.s3 import BeyondError, Place, TakenError, ask, begin, call, insist, several, wait_for
from model.store_errors import AlreadyPublished, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

PART_BYTES = 8 << 20
"""Of an upload in parts: one has to arrive within READ_SECONDS, and S3 takes none below 5 MiB."""

PARTS_OF_A_SIZE = 1000
"""Then parts are twice as large: S3 takes 10,000."""

IN_FLIGHT = 4
"""Parts, or ranges of a large file, that are on their way at once."""

SMALL_FILES = 32
"""Requests for small files that are on their way at once."""


# --- writing ----------------------------------------------------------------------------------------------------------


def publish(uri: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Create the object, whole or not at all. Raises AlreadyPublished if the name is taken by other bytes, StoreError.

    What is larger than a part is sent in parts as the pieces come, and visible once the last one is acknowledged.
    """
    place, parts = Place.of(uri), _parts(pieces)
    first, second = next(parts, b""), next(parts, None)
    try:
        if second is None:
            wait_for(_create(place, first))
        else:
            _create_of_parts(place, chain([first, second], parts))
    except FileNotFoundError as error:  # an upload that somebody has aborted
        raise StoreError(errno.EIO, f"publishing {uri}: {error.strerror}") from error


def publish_many(objects: Mapping[str, bytes]) -> None:
    """`publish` small objects at once."""
    wait_for(_create_many(objects))


def replace(uri: str, data: bytes) -> None:
    """Write the object over what is there. Raises StoreError."""
    wait_for(call(Place.of(uri), "writing", "put_object", Body=data))


async def _create(place: Place, data: bytes) -> None:
    try:
        await call(place, "publishing", "put_object", Body=data, IfNoneMatch="*")
    except TakenError:
        if await _read(place, 0, None) != data:
            raise _already(place) from None


async def _create_many(objects: Mapping[str, bytes]) -> None:
    await several(SMALL_FILES, [_create(Place.of(uri), data) for uri, data in objects.items()])


def _create_of_parts(place: Place, parts: Iterable[bytes]) -> None:
    upload = wait_for(call(place, "publishing", "create_multipart_upload"))["UploadId"]
    digest, size, tags = hashlib.sha256(), 0, list[str]()
    running: deque[Future[dict[str, Any]]] = deque()
    try:
        for number, part in enumerate(parts, 1):
            if len(running) == IN_FLIGHT:
                tags.append(running.popleft().result()["ETag"])
            part_of = {"UploadId": upload, "PartNumber": number, "Body": part}
            running.append(begin(call(place, "publishing", "upload_part", **part_of)))
            digest.update(part)
            size += len(part)
        tags += [one.result()["ETag"] for one in running]
        wait_for(_complete(place, upload, tags, size, digest.hexdigest()))
    except BaseException:
        for one in running:
            one.cancel()
        with suppress(Exception):  # a bucket's own rule for uploads that were never completed removes it else
            wait_for(ask(place, "abort_multipart_upload", UploadId=upload))
        raise


async def _complete(place: Place, upload: str, tags: list[str], size: int, digest: str) -> None:
    listed = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}
    try:
        await call(
            place, "publishing", "complete_multipart_upload",
            UploadId=upload, MultipartUpload=listed, IfNoneMatch="*",
        )  # fmt: skip
    except (TakenError, FileNotFoundError):  # there is no such upload any more: it may be complete
        if await _digest(place, size) != digest:
            raise _already(place) from None
        with suppress(Exception):  # another's object of the same bytes leaves this upload open
            await ask(place, "abort_multipart_upload", UploadId=upload)


async def _digest(place: Place, size: int) -> str:
    """sha256 of the object, "" if it has another size. Raises FileNotFoundError."""
    answer = await call(place, "looking at", "head_object")
    if answer["ContentLength"] != size:
        return ""
    total = hashlib.sha256()
    for start in range(0, size, PART_BYTES):
        total.update(await _read(place, start, PART_BYTES))
    return total.hexdigest()


def _parts(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes in parts of an upload's size; the last may be smaller."""
    held, number = bytearray(), 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            size = PART_BYTES << number // PARTS_OF_A_SIZE
            room = size - len(held)
            held += view[:room]
            view = view[room:]
            if len(held) == size:
                yield bytes(held)
                held.clear()
                number += 1
    if held:
        yield bytes(held)


def _already(place: Place) -> AlreadyPublished:
    return AlreadyPublished(errno.EEXIST, f"{place.uri} is there already")


# --- reading ----------------------------------------------------------------------------------------------------------


def read(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start` (to the end if None). Raises FileNotFoundError, StoreError."""
    return wait_for(_read(Place.of(uri), start, length))


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The objects, asked for at once. Raises FileNotFoundError, StoreError."""
    return wait_for(_read_many(uris))


def exists(uri: str) -> bool:
    try:
        wait_for(call(Place.of(uri), "looking at", "head_object"))
    except FileNotFoundError:
        return False
    return True


def modified(uri: str) -> float:
    """When it was written, in seconds since the epoch. Raises FileNotFoundError, StoreError."""
    return float(wait_for(call(Place.of(uri), "looking at", "head_object"))["LastModified"].timestamp())


def names(uri: str) -> list[str]:
    """What lies right below `uri`, sorted; nothing if nothing does. Raises StoreError."""
    found = wait_for(_list(Place.of(uri), "/"))
    return sorted({name.split("/", 1)[0] for name in found} - {""})


def tree(uri: str) -> list[str]:
    """Every object below `uri`, as paths relative to it, sorted. Raises StoreError."""
    return sorted(name for name in wait_for(_list(Place.of(uri), "")) if name)


async def _read(place: Place, start: int, length: int | None) -> bytes:
    """The first range says how large the object is; the rest of a large one comes in several at once."""
    if length == 0:
        return b""
    first, size = await _range(place, start, min(length or PART_BYTES, PART_BYTES))
    end = size if length is None else min(size, start + length)
    starts = range(start + len(first), end, PART_BYTES)
    rest = await several(IN_FLIGHT, [_range(place, at, min(PART_BYTES, end - at)) for at in starts])
    return b"".join([first, *(data for data, _ in rest)]) if rest else first


async def _range(place: Place, start: int, length: int) -> tuple[bytes, int]:
    """Those bytes, and the size of the whole object. Nothing from beyond its end."""

    async def once() -> tuple[bytes, int]:
        answer = await ask(place, "get_object", Range=f"bytes={start}-{start + length - 1}")
        async with answer["Body"] as body:
            data = await body.read()
        return data, int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])

    try:
        return await insist(place, "reading", once)
    except BeyondError:
        return b"", start


async def _read_many(uris: Sequence[str]) -> list[bytes]:
    return await several(SMALL_FILES, [_read(Place.of(uri), 0, None) for uri in uris])


async def _list(place: Place, delimiter: str) -> list[str]:
    """Names below a place, relative to it; with a delimiter those right below, folders with it at their end."""
    prefix = f"{place.key}/" if place.key else ""
    found, more = list[str](), dict[str, str]()
    while True:
        page = await call(place, "listing", "list_objects_v2", Key=None, Prefix=prefix, Delimiter=delimiter, **more)
        found += [one["Key"][len(prefix) :] for one in page.get("Contents", [])]
        found += [one["Prefix"][len(prefix) :] for one in page.get("CommonPrefixes", [])]
        if not page.get("IsTruncated"):
            return found
        more = {"ContinuationToken": page["NextContinuationToken"]}


# --- removing ---------------------------------------------------------------------------------------------------------


def remove(uri: str) -> None:
    """Remove one object; nothing if it is not there. Raises StoreError."""
    with suppress(FileNotFoundError):
        wait_for(call(Place.of(uri), "removing", "delete_object"))


def remove_tree(uri: str) -> None:
    """Remove every object below `uri`. Raises StoreError."""
    place, found = Place.of(uri), tree(uri)
    for start in range(0, len(found), 1000):
        keys = [{"Key": f"{place.key}/{name}"} for name in found[start : start + 1000]]
        answer = wait_for(call(place, "removing", "delete_objects", Key=None, Delete={"Objects": keys, "Quiet": True}))
        if errors := answer.get("Errors"):
            first = errors[0]
            raise StoreError(errno.EIO, f"removing s3://{place.bucket}/{first['Key']}: {first.get('Message')}")
