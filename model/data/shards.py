"""Tar shards as a source of images: the set of all shards, of which only counts are in memory, and reading by range.

    build_or_read(data, run_dir, tell) -> ShardSet      every rank reads the same one; made at the first use
    ShardSource(set, data).image(number)                image `number`, counted through the shards in their order

The index of a shard is a file of its own (`model.data.tar_shard`), read whole while its samples are due. A run keeps
the set it began with: shards that come later are not seen, so the order of the data does not depend on them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from model import config, contract, storage
from model.data import tar_shard
from model.data.captions import MOST_CAPTIONS, Captions
from model.data.errors import DataError, Skipped, UnreadableImageError
from model.data.images import Picture, decode
from model.data.patience import patiently
from model.data.patterns import absolute, locate
from model.data.read_ahead import Piece, read_now
from model.data.skips import MOST_NAMES, too_many
from model.data.splits import HIDDEN, SPLITS
from model.data.tar_shard import Samples, Shard
from model.data.threads import Tell, in_threads

VERSION = 1
THREADS = 16
OPEN_SHARDS = 4
"""Indices kept in memory, for each lane: a lane's shard, the next one, and what replacements open in between."""

LONGEST_CAPTION = 10_000
"""Bytes that are looked at."""

REWRITTEN = "not an image or caption of the index any more: its shard was rewritten; `dinoctl data index` again"

INDEXED = "indexed %s of %s tar shards"
"""What `tell` is told of, for the log."""


class ShardSet(contract.Record, frozen=True):
    """All shards of a `data.path`: column by column, as there may be hundreds of thousands."""

    index: str  # the folder of the shards' indices
    paths: list[str]
    bytes: list[int]
    samples: list[int]
    without_image: int
    skipped: list[Skipped]  # shards that are damaged, from some point on
    splits: dict[str, list[int]] = msgspec.field(default_factory=dict)  # samples of each split, shard by shard
    captioned: dict[str, list[int]] = msgspec.field(default_factory=dict)  # those of them that have a caption
    links: int = 0  # files that are passed over
    repeated: int = 0

    @property
    def total(self) -> int:
        return sum(self.samples)

    @property
    def holds(self) -> str:
        """For messages."""
        return f"{len(self.paths):,} tar shards, from some point on,"

    @property
    def where(self) -> str:
        """For messages."""
        return f"{len(self.paths):,} tar shards ({self.paths[0]} ...)"

    @property
    def lost(self) -> list[str]:
        """What lies in the shards and cannot be read from them, for messages."""
        of_links = f"{self.links:,} files are links, of which a tar holds no bytes: tar with -h --hard-dereference"
        repeated = f"{self.repeated:,} files are passed over, as a later one of their sample has their name"
        return [text for count, text in ((self.links, of_links), (self.repeated, repeated)) if count]


# --- the set ----------------------------------------------------------------------------------------------------------


def set_file(index: str, patterns: list[str]) -> str:
    """Where the folder of an index, or of a run, keeps the set that these patterns name."""
    key = "\0".join([str(VERSION), *patterns])
    return f"{index}/set-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.json"


def build_or_read(data: config.Data, run_dir: str, tell: Tell) -> ShardSet:
    """The run's set of shards: what it began with, else what `data.index` holds, else made now.

    Raises DataError for shards that are not there or hold no image, BadDataError for too many damaged ones,
    StoreError.
    """
    patterns = [absolute(pattern) for pattern in data.shards]
    index = os.path.abspath(data.index) if data.index else f"{run_dir}/data/shards"
    kept = set_file(f"{run_dir}/data", patterns)
    try:
        return _read_set(kept, index)
    except FileNotFoundError:
        found = index_shards(patterns, index, tell)
    check_shards(found, data.max_skip_rate)  # before it is kept: repaired shards are looked at anew
    try:
        storage.publish(kept, contract.encode(found))
    except storage.AlreadyPublished:
        return _read_set(kept, index)
    return found


def _read_set(file: str, index: str) -> ShardSet:
    """The set in a file, with the indices where they lie now: a run or a folder may have been moved."""
    return msgspec.structs.replace(contract.decode(storage.read(file), ShardSet, file), index=index)


def index_shards(patterns: list[str], index: str, tell: Tell) -> ShardSet:
    """The set in the folder `index`, made if it is not there, or names damaged shards, which may have been mended."""
    try:
        found = _read_set(set_file(index, patterns), index)
    except FileNotFoundError:
        return index_anew(patterns, index, tell)
    return index_anew(patterns, index, tell) if found.skipped else found


def index_anew(patterns: list[str], index: str, tell: Tell) -> ShardSet:
    """The set as the shards are now, kept in the folder `index`. Shards that are as they were are not looked into, so
    what an interrupted making left is used. Raises as build_or_read."""
    found = build(patterns, index, tell)
    storage.replace(set_file(index, patterns), contract.encode(found))
    return found


def build(patterns: list[str], index: str, tell: Tell) -> ShardSet:
    """The set as the shards are now; who has no index gets one in the folder. Raises as build_or_read."""
    paths = locate(patterns)
    shards: list[Shard] = []
    for shard in in_threads(partial(tar_shard.ensure, index), paths, THREADS):
        shards.append(shard)
        tell(len(shards), len(paths))
    made = ShardSet(
        index=index,
        paths=paths,
        bytes=[shard.bytes for shard in shards],
        samples=[shard.samples for shard in shards],
        without_image=sum(shard.without_image for shard in shards),
        skipped=[Skipped(path=shard.path, reason=shard.damage) for shard in shards if shard.damage],
        links=sum(shard.links for shard in shards),
        repeated=sum(shard.repeated for shard in shards),
    )
    if all(len(shard.splits) == len(SPLITS) for shard in shards):  # else it was indexed before there were any
        for place, split in enumerate(SPLITS):
            made.splits[split] = [shard.splits[place] for shard in shards]
            made.captioned[split] = [shard.captioned[place] for shard in shards]
    if not made.total:
        why = f"; {made.skipped[0].path}: {made.skipped[0].reason}" if made.skipped else ""
        raise DataError(
            f"data.path: no images in {made.where}{why}. Samples are named as in WebDataset: key.jpg, key.txt, key.cls"
        )
    return made


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a sample lies: the shard's number and the sample's in it."""

    shard: int
    sample: int


class ShardSource:
    """The images of a set of shards by number, `read` piece by piece. Safe to call from several threads."""

    def __init__(
        self, found: ShardSet, data: config.Data, captioned: bool = False, read: Callable[[Piece], bytes] = read_now
    ) -> None:
        """`captioned`: only the samples that have a caption. Raises DataError, BadDataError."""
        self._set, self._data, self._read = found, data, read
        self._hidden, self._captioned = HIDDEN[data.hold_out], captioned
        self.counts = visible_counts(found, data.hold_out, captioned)
        self._ends = np.cumsum(self.counts)
        self.lanes, self.window = data.lanes, data.window
        self._opened = lru_cache(maxsize=OPEN_SHARDS * data.lanes)(self._open)
        check_shards(found, data.max_skip_rate)

    def place(self, number: int) -> Place:
        """Where the image lies: counted through those that are seen."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return Place(shard, number - int(self._ends[shard] - self.counts[shard]))

    def _sample(self, number: int) -> tuple[str, Samples, int]:
        """The image's shard, its index, and the sample's number in it."""
        place = self.place(number)
        samples, visible = self._opened(place.shard)
        sample = place.sample if visible is None else int(visible[place.sample])
        return self._set.paths[place.shard], samples, sample

    def pieces(self, number: int, captioned: bool) -> list[Piece]:
        """What `image`, and with `captioned` also `caption`, read."""
        both = (self._image_piece(number), self._caption_piece(number) if captioned else None)
        return [piece for piece in both if piece is not None]

    def image(self, number: int) -> Picture:
        """Raises UnreadableImageError; StoreError if the store stays out of reach."""
        size = int(self._record(number)["image_bytes"])
        return decode(self._bytes(self._image_piece(number), number, size), self._data)

    def caption(self, number: int) -> str:
        """The first line of the caption, "" if there is none."""
        piece, size = self._caption_piece(number), int(self._record(number)["caption_bytes"])
        return "" if piece is None else first_line(self._bytes(piece, number, size))

    def captions(self) -> Captions:
        """A bounded number of them, spread evenly over all."""
        total = int(self._ends[-1])
        count = min(MOST_CAPTIONS, total)
        numbers = [place * total // count for place in range(count)]
        which = "\n".join([self._data.hold_out, str(count), *self._set.paths, *map(str, self._set.bytes)])
        return Captions(which, lambda: list(in_threads(self._caption_or_none, numbers, 2 * THREADS)))

    def _caption_or_none(self, number: int) -> str:
        try:
            return self.caption(number)
        except UnreadableImageError:
            return ""

    def label(self, number: int) -> int | None:
        """The number in the sample's .cls, None if it has none."""
        value = int(self._record(number)["label"])
        return None if value < 0 else value

    def name(self, number: int) -> str:
        """Shard and key, for people."""
        path, samples, sample = self._sample(number)
        return f"{path}: {samples.key(sample)}"

    def _record(self, number: int) -> np.void:
        _, samples, sample = self._sample(number)
        record: np.void = samples.records[sample]
        return record

    def _image_piece(self, number: int) -> Piece:
        path, samples, sample = self._sample(number)
        record = samples.records[sample]
        return _with_header(path, int(record["image"]), int(record["image_bytes"]))

    def _caption_piece(self, number: int) -> Piece | None:
        path, samples, sample = self._sample(number)
        record = samples.records[sample]
        size = min(int(record["caption_bytes"]), LONGEST_CAPTION)
        return _with_header(path, int(record["caption"]), size) if size else None

    def _bytes(self, piece: Piece, number: int, size: int) -> bytes:
        """What the piece holds behind its header, which must be that of a file of the sample, of so many bytes."""
        data = self._read(piece)
        if len(data) < piece.length:
            raise UnreadableImageError("the shard ends before it: it was longer when it was indexed")
        _, samples, sample = self._sample(number)
        if not samples.owns(data[: tar_shard.BLOCK], sample, size):
            raise UnreadableImageError(REWRITTEN)
        return data[tar_shard.BLOCK :]

    def _open(self, shard: int) -> tuple[Samples, NDArray[np.int64] | None]:
        """The shard's index, and which of its samples are seen (None: all)."""
        file = tar_shard.file_of(self._set.index, self._set.paths[shard], self._set.bytes[shard])
        samples = patiently(partial(tar_shard.read, file))
        some = self._hidden or self._captioned
        return samples, samples.visible(self._hidden, self._captioned) if some else None


def _with_header(path: str, start: int, length: int) -> Piece:
    """The bytes of a tar's file, and the header before them."""
    return Piece(path, start - tar_shard.BLOCK, tar_shard.BLOCK + length)


def visible_counts(found: ShardSet, hold_out: str, captioned: bool) -> NDArray[np.int64]:
    """How many samples of each shard training sees. Raises DataError if that is none, or cannot be told."""
    if hold_out == "none" and not captioned:
        return np.array(found.samples, np.int64)
    if not found.splits:
        raise DataError(
            f"data.path: {found.where}: this index was made by an older dinoctl, which counted no captions and splits; "
            f"remove {found.index}, and it is made again"
        )
    by_split = found.captioned if captioned else found.splits
    seen = [by_split[split] for split in SPLITS if split not in HIDDEN[hold_out]]
    counts: NDArray[np.int64] = np.array(seen, np.int64).sum(axis=0)
    if not counts.sum():
        what = "no sample has a caption (key.txt, its first line)" if captioned else "no sample is left to train on"
        raise DataError(f"data.path: {found.where}: with hold_out {hold_out!r} {what}")
    return counts


def first_line(caption: bytes) -> str:
    return caption.decode("utf-8", "replace").split("\n", 1)[0].strip()


def check_shards(found: ShardSet, most: float) -> None:
    """Raises BadDataError if more than the share `most` of the shards are damaged."""
    if len(found.skipped) > most * len(found.paths):
        raise too_many(len(found.skipped), f"of {found.where}", most, found.skipped[-MOST_NAMES:])
