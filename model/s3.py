"""Asking an S3 store: one connection for a process, patience with what may be over in a moment, and a sentence for what
will not be.

Credentials, region and endpoint come from AWS's own variables or profile, and from nowhere else.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from model.store_errors import DiskFullError, NoAccessError, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS, READ_SECONDS = 10, 20
LONGEST_WAIT = 8.0


@dataclass
class Patience:
    """Seconds for which a request that fails is made again. Who is watched by a person, or asks again himself, has
    less of it than who would end a training."""

    seconds: float = 100.0


PATIENCE = Patience()


class TakenError(Exception):
    """If-None-Match: there is an object of that name."""


@dataclass(frozen=True)
class Place:
    """`s3://bucket/key`."""

    uri: str
    bucket: str
    key: str

    @staticmethod
    def of(uri: str) -> Place:
        bucket, _, key = uri.partition("://")[2].partition("/")
        return Place(uri, bucket, key.rstrip("/"))


def is_ours(path: str) -> bool:
    """Whether a path is a URI that a run can lie at."""
    return path.startswith(("s3://", "s3a://"))


@lru_cache(maxsize=4)
def _connected(process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """s3fs with one connection pool for all threads. A fork has no part in it: its event loop's thread is not there."""
    from s3fs import S3FileSystem  # takes a second, and only runs in buckets need it

    system = S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
        },
    )
    system.retries = 1  # `insist` asks again, and knows for how long
    return system


def _system() -> Any:
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return _connected(os.getpid(), tuple(settings))


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Have fsspec's event loop, in a thread of its own, do it."""
    return asyncio.run_coroutine_threadsafe(work, _system().loop)


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    return begin(work).result()


async def several(most: int, works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them, at most so many at once. The first failure is raised once all have ended."""
    some = asyncio.Semaphore(most)

    async def one(work: Coroutine[Any, Any, T]) -> T:
        async with some:
            return await work

    answers = await asyncio.gather(*map(one, works), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def call(place: Place, doing: str, method: str, **arguments: Any) -> dict[str, Any]:
    """One request of S3's API, with patience. Raises FileNotFoundError, StoreError, TakenError."""
    return await insist(place, doing, lambda: ask(place, method, **arguments))


async def ask(place: Place, method: str, **arguments: Any) -> dict[str, Any]:
    given = {"Bucket": place.bucket, "Key": place.key, **arguments}
    answer: dict[str, Any] = await _system()._call_s3(
        method, **{name: value for name, value in given.items() if value is not None}
    )
    return answer


async def insist(place: Place, doing: str, once: Callable[[], Awaitable[T]]) -> T:
    """What `once` answers, asked again while the store fails for the moment. Raises as `call`."""
    began, tries = time.monotonic(), 0
    while True:
        try:
            return await once()
        except Exception as error:
            if (hopeless := _hopeless(error, place, doing)) is not None:
                raise hopeless from error
            tries += 1
            wait = random.uniform(0.5, 1.0) * min(0.25 * 2.0**tries, LONGEST_WAIT)
            passed = time.monotonic() - began
            why = f"{doing} {place.uri}: {_words(error)}"
            if passed + wait > PATIENCE.seconds:
                message = f"{why}; asked {tries} times in {passed:.0f} s"
                raise StoreError(errno.EIO, message) from error
            log.log(logging.WARNING if tries > 3 else logging.INFO, "%s; again in %.1f s", why, wait)
            await asyncio.sleep(wait)


# --- what a failure means ---------------------------------------------------------------------------------------------


class BeyondError(Exception):
    """A range that begins where the object has ended."""


FOR_THE_MOMENT = {"RequestTimeout", "IncompleteBody", "BadDigest", "InternalError", "XAmzContentSHA256Mismatch"}
"""What S3 calls the caller's fault (400), and is the network's."""

ACCESS = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AuthorizationHeaderMalformed", "PermanentRedirect",
          "IllegalLocationConstraintException", "InvalidBucketName", "TokenRefreshRequired"}  # fmt: skip

HOW = (
    "credentials, region and endpoint come from AWS's own variables or profile (AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL), "
    "and must allow to list the bucket and to get, put and delete in it"
)


def _hopeless(error: Exception, place: Place, doing: str) -> Exception | None:
    """What to raise for a failure that asking again does not mend; None for one that may be over in a moment."""
    import aiohttp
    from botocore import exceptions as boto

    for one in (error, error.__cause__):  # s3fs wraps what S3 said
        if isinstance(one, boto.ClientError):
            return _said(one, place, doing)
    transport = (boto.HTTPClientError, boto.ConnectionError, boto.ResponseStreamingError, boto.IncompleteReadError)
    if isinstance(error, (*transport, aiohttp.ClientError, OSError, TimeoutError)):
        return None
    if type(error).__name__ == "ResponseParserError":  # half an answer
        return None
    if isinstance(error, (boto.BotoCoreError, ValueError)):  # no credentials, no such profile, no URL
        return NoAccessError(errno.EACCES, f"{doing} {place.uri}: {_words(error)}: {HOW}")
    return error


def _said(error: Any, place: Place, doing: str) -> Exception | None:
    """What S3's answer means."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    what = f"{doing} {place.uri}: {_words(error)}"
    if code == "NoSuchBucket":
        return NoAccessError(errno.ENOENT, f"{what}: make the bucket {place.bucket}, or name one that is there; {HOW}")
    if status == 507 or "Quota" in code or "StorageFull" in code:
        return DiskFullError(errno.EDQUOT, what)
    if status in (401, 403) or code in ACCESS:
        return NoAccessError(errno.EACCES, f"{what}: {HOW}")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, f"no such file: {place.uri}")
    if status == 412:
        return TakenError()
    if status == 416:
        return BeyondError()
    if status in (408, 409, 429) or (status >= 500 and status != 501) or code in FOR_THE_MOMENT:
        return None
    return StoreError(errno.EIO, what)


def _words(error: BaseException) -> str:
    """One line; the class where the message says nothing by itself."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
