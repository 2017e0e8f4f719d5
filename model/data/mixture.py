"""Several sources in one order, in given shares: what a phase with `data.also` draws its images from.

Batches are dealt first: of every thousand each source with `batches: whole` has its share for itself, the others are
mixed. Of every thousand images of mixed batches each source that is mixed in has its share, `data.path` the rest. Where
in a thousand is a draw. So every source has a position of its own, a function of the run's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.data.order import Order
from model.data_section import PER_THOUSAND
from model.draws import generator


class Deal:
    """A stream of places dealt to hands: hand h has `counts[h]` of every thousand, hand 0 the rest of them."""

    def __init__(self, seed: int, stream: str, counts: Sequence[int]) -> None:
        self.counts = [PER_THOUSAND - sum(counts), *counts]
        self._seed, self._stream = seed, stream
        self._thousand = lru_cache(maxsize=4)(self._draw)

    def at(self, place: int) -> tuple[int, int]:
        """The hand that has the place, and how many places that hand has before it."""
        thousand, inside = divmod(place, PER_THOUSAND)
        hands, before = self._thousand(thousand)
        hand = int(hands[inside])
        return hand, thousand * self.counts[hand] + int(before[inside])

    def _draw(self, thousand: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        hands = np.repeat(np.arange(len(self.counts)), self.counts)
        hands = generator(self._seed, self._stream, thousand).permutation(hands)
        before = np.empty(PER_THOUSAND, np.int64)
        for hand, count in enumerate(self.counts):
            before[hands == hand] = np.arange(count)
        return hands, before


@dataclass(frozen=True)
class Share:
    """What one source beside the first one gets."""

    thousandths: int
    batches: Literal["mixed", "whole"]


class MixedOrder:
    """Orders, the first of `data.path`, as one: an image's number counts through all. Safe in several threads."""

    def __init__(self, seed: int, origin: str, orders: Sequence[Order], shares: Sequence[Share], batch: int) -> None:
        self._orders, self._batch = list(orders), batch
        self._first = np.cumsum([0, *(order.total for order in orders)]).tolist()
        kinds = [share.batches for share in shares]
        self._whole = [0, *(n for n, kind in enumerate(kinds, 1) if kind == "whole")]
        self._mixed = [0, *(n for n, kind in enumerate(kinds, 1) if kind == "mixed")]
        counts = [0, *(share.thousandths for share in shares)]
        self._batches = Deal(seed, f"{origin}/mix-batches", [counts[n] for n in self._whole[1:]])
        self._images = Deal(seed, f"{origin}/mix-images", [counts[n] for n in self._mixed[1:]])

    def number(self, position: int) -> int:
        """The image at a position."""
        source, own = self._own(position)
        return int(self._first[source]) + self._orders[source].number(own)

    def replacement(self, position: int, attempt: int) -> int:
        """As Order's, of the source that the position belongs to."""
        source, own = self._own(position)
        return int(self._first[source]) + self._orders[source].replacement(own, attempt)

    def _own(self, position: int) -> tuple[int, int]:
        """The source that the position belongs to, and the position in its order."""
        clock, inside = divmod(position, self._batch)
        hand, before = self._batches.at(clock)
        place = before * self._batch + inside
        if hand:
            return self._whole[hand], place
        hand, own = self._images.at(place)
        return self._mixed[hand], own
