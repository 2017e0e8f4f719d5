"""All images of a `data.path`, by number, for the commands that look at each of them: `check` and `stats`.

Unlike a phase's source nothing is held out, and nothing stops at the first that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model import config, storage
from model.data import files, index as folders, shards
from model.data.errors import DataError, Skipped
from model.data.images import Picture, decode
from model.data.patterns import absolute
from model.data.shards import ShardSet, ShardSource
from model.data.threads import Tell


@dataclass(frozen=True)
class Whole:
    """`image` raises UnreadableImageError, StoreError; so does `caption`, of one that makes its image unreadable.
    `shards`: the set that they are in; None for a folder. `closed`: the folders in it that may not be listed."""

    total: int
    where: str
    image: Callable[[int], Picture]
    caption: Callable[[int], str | None]
    name: Callable[[int], str]
    shards: ShardSet | None
    closed: Sequence[Skipped] = ()


def open_whole(data: config.Data, index: str, tell: Tell) -> Whole:
    """Tar shards are indexed in the folder `index` unless they are. Raises DataError, StoreError."""
    if data.shards:
        found = shards.index_shards(patterns_of(data), index, tell)
        source = ShardSource(found, data.model_copy(update={"max_skip_rate": 1.0}))
        return Whole(found.total, found.where, source.image, source.caption, source.name, found)
    if storage.is_uri(data.shown):
        raise DataError(f"{data.shown}: of what is on a bucket only tar shards can be read; their names end in .tar")
    root = folders.folder(data.shown)
    paths, closed = folders.list_all(root, data.suffixes)
    if not paths:
        raise DataError(f"no images under {root}{_shards_in(root, data.shown)}{folders.closed_too(closed)}")

    def image(number: int) -> Picture:
        return decode(files.read(root / paths[number], root), data)

    def caption(number: int) -> str | None:
        return folders.read_caption((root / paths[number]).with_suffix(folders.CAPTION))

    return Whole(len(paths), str(root), image, caption, paths.__getitem__, None, closed)


def _shards_in(root: Path, shown: str) -> str:
    """What to say of a folder of tar shards that was named itself."""
    first = next(iter(sorted(root.glob("*.tar"))), None)
    if first is None:
        return ""
    there = shown.rstrip("/")
    return f", but tar shards ({first.name}): name those, as {there}/*.tar or {there}/x-{{000000..000123}}.tar"


def patterns_of(data: config.Data) -> list[str]:
    """Raises DataError for a folder."""
    if not data.shards:
        raise DataError(f"{data.shown}: not tar shards (.tar); a folder of images needs no index ahead of time")
    return [absolute(pattern) for pattern in data.shards]
