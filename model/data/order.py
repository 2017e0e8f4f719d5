"""Which image stands at which position of a run: every image once an epoch, in an order of its own each epoch.

Positions count images from the origin of the clock (a chain of phases joined by `init` has one), so that a phase that
goes on with another's training state goes on in its order too. An image is a number, counted through the shards in the
order in which they are named.

An epoch's shards are shuffled and laid end to end; that line is cut into as many lanes, equally long to within one, as
`lanes` says; within a lane each `window` of images is shuffled. Position after position goes to lane after lane. So a
lane reads its shards in sequence, nothing is as long as the list of all images, and no number of processes or loader
threads has a part in it. A folder is one shard, one lane and one window: a permutation of all its images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.draws import generator

Ints = NDArray[np.int64]


class Order:
    """The order of `counts[s]` images in each shard s. Safe to call from several threads."""

    def __init__(self, seed: int, origin: str, counts: Ints, lanes: int, window: int) -> None:
        self.seed, self.origin, self.counts, self.window = seed, origin, counts, window
        self.total = int(counts.sum())
        self.lanes = min(lanes, self.total)
        self._first = np.cumsum(counts) - counts  # the number of each shard's first image
        self._shards = lru_cache(maxsize=2)(self._draw_shards)  # two: threads work on either side of an epoch's end
        self._windows = lru_cache(maxsize=4 * self.lanes)(self._draw_window)

    def number(self, position: int) -> int:
        """The image at a position."""
        epoch, place = divmod(position, self.total)
        turn, lane = divmod(place, self.lanes)
        shards, ends = self._shards(epoch)
        place = self._start(lane) + self._shuffled(epoch, lane, turn)
        at = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[at])
        return int(self._first[shard]) + place - (int(ends[at]) - int(self.counts[shard]))

    def replacement(self, position: int, attempt: int) -> int:
        """The image to try (attempt 1, 2 ...) where the one at `position` is unreadable: a draw of the position alone,
        so that nothing else shifts."""
        return int(generator(self.seed, f"{self.origin}/replacement", position, attempt).integers(self.total))

    def _start(self, lane: int) -> int:
        length, longer = divmod(self.total, self.lanes)
        return lane * length + min(lane, longer)

    def _shuffled(self, epoch: int, lane: int, turn: int) -> int:
        """The place in its lane of the image that has its turn there."""
        block, inside = divmod(turn, self.window)
        return block * self.window + int(self._windows(epoch, lane, block)[inside])

    def _draw_window(self, epoch: int, lane: int, block: int) -> Ints:
        length = self._start(lane + 1) - self._start(lane)
        alone = self.lanes == 1 and length <= self.window  # a folder: its order is a draw of the epoch, as ever
        keys = (epoch,) if alone else (epoch, lane, block)
        size = min(self.window, length - block * self.window)
        return generator(self.seed, f"{self.origin}/order", *keys).permutation(size)

    def _draw_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's order of the shards, and where each ends in it."""
        shards = generator(self.seed, f"{self.origin}/shards", epoch).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])
