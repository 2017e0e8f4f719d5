"""The loader: one rank's part of every step's batch, in order, prepared ahead by threads.

A batch is a function of (settings, stream, clock) alone, so that any number of threads, a resumed run and
another number of ranks see the same images, crops and masks. Threads rather than processes: decoding, resizing and the
array work release the interpreter lock, and nothing has to be pickled or shared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from model import config
from model.data import text
from model.data.augment import Recipe, as_released, ssl_views, whole_views
from model.data.batch import Batch, PairBatch, SslBatch
from model.data.errors import BadDataError, DataError, Skipped, UnreadableImageError
from model.data.images import Picture
from model.data.index import Index
from model.data.masks import group_masks
from model.data.read_ahead import Piece, ReadAhead, read_now
from model.data.shards import ShardSource
from model.data.skips import Skips
from model.data.sources import Found, Source, draw, open_sources
from model.data.threads import deaf
from model.data.views import PairViews, SslViews, Views
from model.draws import generator

MOST_REPLACEMENTS = 100


@dataclass(frozen=True)
class Stream:
    """Which batches a loader makes: of whose order, at which clocks, and which rank's part of them."""

    seed: int
    origin: str
    clocks: range
    rank: int = 0
    world: int = 1
    jumps: tuple[tuple[int, int], ...] = ()  # (clock, steps): from there on the data of so many steps is jumped over
    ahead: int = 0  # how many batches further than the first clock the data's order is there

    def data_clock(self, clock: int) -> int:
        """Which batch of the data's order is that of the clock."""
        return clock + self.ahead + sum(steps for at, steps in self.jumps if self.clocks.start <= at <= clock)


class Loader:
    """Iterates over the batches of a stream.

    Iterating raises whatever went wrong in a thread, at the batch it belongs to: BadDataError where no replacement of
    an image can be read either. Whether too many had to be replaced only all ranks together can tell (`model.train`).
    `tokenizer` is the JSON of a text phase's tokenizer, else None. Making a Loader raises DataError or BadDataError.
    """

    def __init__(
        self,
        settings: config.AnyPhase,
        stream: Stream,
        found: list[Found],
        run_dir: str,
        views: Callable[[int], Views],
    ) -> None:
        self.tokenizer: str | None = None
        self._reading: ReadAhead | None = None
        self._sources = open_sources(found, settings.data, isinstance(settings, config.TextPhase), self._read)
        if isinstance(settings, config.TextPhase):
            self.tokenizer = text.build_or_read(self._sources[0].captions(), settings.text.vocabulary, run_dir)
        self._make = _Maker(settings, stream, self._sources, self.tokenizer, views)
        self._clocks = stream.clocks
        self._workers = settings.data.workers
        self._pool: ThreadPoolExecutor | None = None
        self._budget = settings.data.read_ahead_mib * 2**20
        self.skipped = Skips()
        """Unreadable images in the batches handed out so far; those that the index knows of are not among them."""
        self.due = 0
        """Images in those batches."""
        self.total = self._make.ends[-1]
        """Images to draw from."""
        self.left_out = sum(len(one.skipped) for one in found if isinstance(one, Index))
        """Images of folders that cannot be drawn, as the index found them unreadable."""

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        if any(isinstance(source, ShardSource) for source in self._sources):
            self._reading = ReadAhead(self._clocks, self._make.pieces, self._budget, least=self._workers + 1)
        try:
            for batch, skipped in self._ahead() if self._workers else map(self._batch, self._clocks):
                self.due += len(batch.positions)
                self.skipped.add(skipped)
                yield batch
        finally:
            self.close()

    def _batch(self, clock: int) -> tuple[Batch, list[Skipped]]:
        with self._reading.batch(clock) if self._reading else nullcontext():
            return self._make.batch(clock)

    def _read(self, piece: Piece) -> bytes:
        return self._reading.read(piece) if self._reading else read_now(piece)

    def _ahead(self) -> Iterator[tuple[Batch, list[Skipped]]]:
        """The same batches, each made by one of the threads, at most one more than there are threads in waiting."""
        pool = self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="loader", initializer=deaf)
        waiting: deque[Future[tuple[Batch, list[Skipped]]]] = deque()
        try:
            for clock in self._clocks:
                waiting.append(pool.submit(self._batch, clock))
                if len(waiting) > self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Drop what is not begun, wait for what is, and join the threads."""
        if self._reading is not None:
            self._reading.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._reading is not None:  # after the threads that take from it
            self._reading.close()
            self._reading = None


def learn_tokenizer(settings: config.AnyPhase, found: list[Found], run_dir: str) -> None:
    """A text phase's tokenizer, which is the same on every rank: one learns it before the others ask.

    Raises DataError, BadDataError, StoreError.
    """
    if isinstance(settings, config.TextPhase):
        (source,) = open_sources(found, settings.data, captioned=True)
        text.build_or_read(source.captions(), settings.text.vocabulary, run_dir)


@dataclass(frozen=True)
class _Sample:
    image: Picture
    caption: str


class _Maker:
    """Makes the batch of a clock; safe to call from several threads."""

    def __init__(
        self,
        settings: config.AnyPhase,
        stream: Stream,
        sources: list[Source],
        tokenizer: str | None,
        views: Callable[[int], Views],
    ) -> None:
        self.settings, self.stream, self.sources, self.views = settings, stream, sources, views
        self.seed, self.origin = stream.seed, stream.origin
        self.order = draw(sources, settings.data, stream.seed, stream.origin, settings.optim.batch_size)
        self.ends = list(accumulate(int(source.counts.sum()) for source in sources))
        self.tokenizer = None if tokenizer is None else text.load(tokenizer)
        batch, group = settings.optim.batch_size, settings.optim.group_size
        if batch % (stream.world * group):
            raise DataError(
                f"optim.batch_size: {batch} images in groups of {group} do not divide over {stream.world} processes; "
                f"take a number of processes that divides {batch // group}"
            )
        share = batch // stream.world
        self.slice = range(stream.rank * share, (stream.rank + 1) * share)

    def batch(self, clock: int) -> tuple[Batch, list[Skipped]]:
        """This rank's part of the batch at `clock`, and the images that had to be replaced in it."""
        positions = self._positions(clock)
        skipped: list[Skipped] = []
        samples = [self._sample(position, skipped) for position in positions]
        views = self.views(clock)
        if isinstance(views, PairViews):
            return self._pairs(positions, samples, views), skipped
        return self._ssl(clock, positions, samples, views), skipped

    def pieces(self, clock: int) -> list[Piece]:
        """What this rank's part of the batch at `clock` takes from tar shards, unless something is unreadable."""
        found: list[Piece] = []
        for position in self._positions(clock):
            source, own = self._find(self.order.number(position))
            found += source.pieces(own, captioned=self.tokenizer is not None)
        return found

    def _positions(self, clock: int) -> list[int]:
        first = self.stream.data_clock(clock) * self.settings.optim.batch_size
        return [first + place for place in self.slice]

    def _sample(self, position: int, skipped: list[Skipped]) -> _Sample:
        """The image at `position`, or the first of its replacements that can be read."""
        number = self.order.number(position)
        captioned = self.tokenizer is not None
        for attempt in range(1, MOST_REPLACEMENTS + 1):
            source, own = self._find(number)
            try:
                return _Sample(source.image(own), source.caption(own) if captioned else "")
            except UnreadableImageError as error:
                skipped.append(Skipped(path=source.name(own), reason=str(error)))
                number = self.order.replacement(position, attempt)
        raise BadDataError(f"data.path: {MOST_REPLACEMENTS} images in a row are unreadable, last {skipped[-1].path}")

    def _find(self, number: int) -> tuple[Source, int]:
        """The source that holds image `number` of all, and its number there."""
        at = bisect_right(self.ends, number)
        return self.sources[at], number - (self.ends[at - 1] if at else 0)

    def _groups(self) -> range:
        size = self.settings.optim.group_size
        return range(self.slice.start // size, self.slice.stop // size)

    def _ssl(self, clock: int, positions: list[int], samples: list[_Sample], views: SslViews) -> SslBatch:
        s = self.settings
        if isinstance(s, config.TextPhase):
            raise TypeError("a text phase has no multi-crop views")
        augment = as_released(s.augment) if s.official_quirks else s.augment
        recipe = Recipe(s.data, augment, s.crops, self.seed, self.origin)
        made = ssl_views(recipe, [one.image for one in samples], positions, views)
        return SslBatch(
            positions=torch.tensor(positions),
            groups=torch.tensor(self._groups()),
            global_crops=torch.from_numpy(made.global_crops),
            local_crops=torch.from_numpy(made.local_crops),
            gram_crops=None if made.gram_crops is None else torch.from_numpy(made.gram_crops),
            masks=torch.from_numpy(self._masks(clock, views, s.losses.ibot)),
        )

    def _masks(self, clock: int, views: SslViews, ibot: config.Ibot) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """[2, b, N], drawn group by group."""
        size, grid = self.settings.optim.group_size, views.resolution.global_size // views.patch_size
        groups = [
            group_masks(
                generator(self.seed, f"{self.origin}/masks", clock, group),
                2 * size,
                grid,
                ibot.mask_probability,
                ibot.mask_ratio,
            ).reshape(2, size, grid * grid)
            for group in self._groups()
        ]
        return np.concatenate(groups, axis=1)

    def _pairs(self, positions: list[int], samples: list[_Sample], views: PairViews) -> PairBatch:
        if self.tokenizer is None:
            raise TypeError("only a text phase has captions")
        images = whole_views([one.image for one in samples], views.image_size, self.settings.data)
        return PairBatch(
            positions=torch.tensor(positions),
            groups=torch.tensor(self._groups()),
            images=torch.from_numpy(images),
            tokens=text.encode(self.tokenizer, [one.caption for one in samples], views.context),
        )
