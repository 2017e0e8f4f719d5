"""Where the images of a phase come from: a folder, or tar shards. The loader asks for images by number and no more.

    build_or_read(data, run_dir, looking) -> [Found]   what is there; made at the first use, the same for every rank
    open_sources(found, data, captioned) -> [Source]   what training may see of it, place by place
    draw(sources, ...) -> Drawn                        which image stands at which position

There is one place for `data.path` and one for each of `data.also`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model import config
from model.data import files, index as folders, shards
from model.data.captions import Captions
from model.data.entries import Entries
from model.data.errors import DataError
from model.data.images import Picture, decode
from model.data.index import Index
from model.data.mixture import MixedOrder, Share
from model.data.order import Order
from model.data.read_ahead import Piece, read_now
from model.data.shards import ShardSet, ShardSource
from model.data_section import PER_THOUSAND

MEMORY_BUDGET = 512 * 2**20
"""Bytes of decoded images that a process keeps; a folder that needs more is decoded at every access instead."""

Found = Index | ShardSet
"""What lies at one place."""

Looking = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how many (`model.looking`)."""

Read = Callable[[Piece], bytes]


class Drawn(Protocol):
    """Which image stands where: `model.data.order`, or several of them (`model.data.mixture`)."""

    def number(self, position: int) -> int: ...

    def replacement(self, position: int, attempt: int) -> int: ...


class Source(Protocol):
    """Images by number, 0 to the sum of `counts`. Safe to call from several threads."""

    counts: NDArray[np.int64]
    """Images of each shard; a folder is one."""
    lanes: int
    window: int

    def image(self, number: int) -> Picture:
        """Over the background. Raises UnreadableImageError; StoreError if the store stays out of reach."""

    def caption(self, number: int) -> str:
        """ "" if it has none."""

    def captions(self) -> Captions:
        """Those that a tokenizer is learnt from, always the same ones."""

    def pieces(self, number: int, captioned: bool) -> list[Piece]:
        """What of tar shards that reads; none of a folder."""

    def name(self, number: int) -> str:
        """For people."""


def build_or_read(data: config.Data, run_dir: str, looking: Looking) -> list[Found]:
    """The run's index of `data.path`, and of each of `data.also`. Raises DataError if one has no image, StoreError."""
    shard, image = (partial(looking, what) for what in (shards.INDEXED, folders.LOOKED_AT))
    return [
        shards.build_or_read(part, run_dir, shard) if part.shards else folders.build_or_read(part, run_dir, image)
        for _, part in data.parts
    ]


def open_sources(found: list[Found], data: config.Data, captioned: bool, read: Read = read_now) -> list[Source]:
    """What training sees of each place; `captioned`: only what has a caption; `read`: how shards are read.

    Raises DataError if that is nothing, BadDataError if too much is known to be unreadable.
    """
    if captioned and len(found) > 1:
        raise DataError("data.also: a text phase reads from one place; give it a `data` without `also`")
    return [_open(one, part, captioned, read) for one, (_, part) in zip(found, data.parts, strict=True)]


def draw(sources: list[Source], data: config.Data, seed: int, origin: str, batch: int) -> Drawn:
    """The order of training over the sources; `batch`: images of a global batch."""
    orders = [
        Order(seed, f"{origin}/also-{number}" if number else origin, one.counts, one.lanes, one.window)
        for number, one in enumerate(sources)
    ]
    if len(orders) == 1:
        return orders[0]
    shares = [Share(round(part.share * PER_THOUSAND), part.batches) for part in data.also]
    return MixedOrder(seed, origin, orders, shares, batch)


def _open(found: Found, data: config.Data, captioned: bool, read: Read) -> Source:
    if isinstance(found, Index):
        return FolderSource(found, data, captioned)
    return ShardSource(found, data, captioned, read)


class FolderSource:
    """The images of a folder: one shard, shuffled whole."""

    def __init__(self, found: Index, data: config.Data, captioned: bool) -> None:
        entries = folders.training_entries(found, data)
        self.entries = _with_captions(entries, found) if captioned else entries
        self.counts: NDArray[np.int64] = np.array([len(self.entries)])
        self.lanes, self.window = 1, len(self.entries)
        self._images = _Images(Path(found.root), self.entries, data)

    def image(self, number: int) -> Picture:
        return self._images.get(number)

    def caption(self, number: int) -> str:
        return self.entries[number].caption or ""

    def pieces(self, number: int, captioned: bool) -> list[Piece]:
        return []

    def captions(self) -> Captions:
        """All of them, in the order of the index: they are in memory."""
        captions = [entry.caption or "" for entry in self.entries]
        return Captions("\n".join(captions), lambda: captions)

    def name(self, number: int) -> str:
        return self.entries[number].path


def _with_captions(entries: Entries, index: Index) -> Entries:
    captioned = entries.captioned()
    if not captioned:
        raise DataError(
            f"data.path: no training image under {index.root} has a caption; a text phase needs a .txt beside each "
            "image, its first line the caption. Leave the text phase out, or add captions"
        )
    return captioned


class _Images:
    """Decoded images by number: kept if all of them fit in the budget, else decoded each time."""

    def __init__(self, root: Path, entries: Entries, data: config.Data) -> None:
        self._root, self._entries, self._data = root, entries, data
        bytes_per_pixel = data.channels * data.bits // 8
        self._keep = entries.pixels() * bytes_per_pixel <= MEMORY_BUDGET
        self._kept: dict[int, Picture] = {}
        self._lock = threading.Lock()

    def get(self, number: int) -> Picture:
        """Raises UnreadableImageError, StoreError."""
        with self._lock:
            kept = self._kept.get(number)
        if kept is not None:
            return kept
        image = decode(files.read(self._root / self._entries[number].path, self._root), self._data)
        if self._keep:
            with self._lock:
                self._kept[number] = image
        return image
