"""`dinoctl data check`: decode every image, read its caption, and name each that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from model import storage
from model.data.errors import Skipped, UnreadableImageError
from model.data.patience import patiently
from model.data.shards import ShardSet
from model.data.threads import Tell, cores, in_threads
from model.data.whole import Whole


def problems(whole: Whole, tell: Tell) -> Iterator[Skipped]:
    """Every damaged shard, every folder that may not be listed and every image that cannot be read, as they are found.
    Raises StoreError."""
    yield from whole.closed
    if whole.shards is not None:
        yield from whole.shards.skipped
        yield from (Skipped(path=whole.where, reason=text) for text in whole.shards.lost)
        yield from _changed(whole.shards)
    look: Callable[[int], Skipped | None] = partial(_look, whole)
    for done, problem in enumerate(in_threads(look, range(whole.total), cores()), 1):
        if problem is not None:
            yield problem
        tell(done, whole.total)


def _look(whole: Whole, number: int) -> Skipped | None:
    try:
        whole.image(number)
        whole.caption(number)
    except UnreadableImageError as error:
        return Skipped(path=whole.name(number), reason=str(error))
    return None


def _changed(found: ShardSet) -> Iterator[Skipped]:
    """Shards that are not as long as when they were indexed."""
    for path, size in zip(found.paths, found.bytes, strict=True):
        now = patiently(partial(storage.size, path))
        if now != size:
            yield Skipped(path=path, reason=f"{now:,} bytes, and {size:,} when it was indexed: index it anew")
