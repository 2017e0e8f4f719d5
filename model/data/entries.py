"""The images of a folder in memory: a row of numbers and the bytes of the path each, as there may be millions.

    Entries.of(entries)         from objects, one after the other
    entries[number] -> Entry    the object, made anew

A million objects with their strings are 370 MB in each process of a machine; these are 85.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from model import contract
from model.data.splits import SPLITS, Split

ROW = np.dtype(
    [("text", "<i8"), ("path_bytes", "<i4"), ("caption_bytes", "<i4"), ("label", "<i4"), ("group", "<i4"),
     ("split", "i1"), ("has_alpha", "?"), ("width", "<i4"), ("height", "<i4")]
)  # fmt: skip
"""text: where the path begins, and right behind it the caption; caption_bytes 0: none; label, split: which of them, -1:
none."""


class Entry(contract.Record, frozen=True):
    """One image that can be read."""

    path: str  # relative to the index's root, with forward slashes
    label: str | None  # the first-level folder; None if the image lies in the root
    caption: str | None  # first line of the .txt beside it
    group: int  # near-duplicates share it
    split: Split
    has_alpha: bool
    width: int
    height: int


class Entries(Sequence[Entry]):
    """Entries by number, in order. Safe to read from several threads."""

    def __init__(self, rows: NDArray[np.void], texts: bytes, labels: list[str], chosen: NDArray[np.int32]) -> None:
        self._rows, self._texts, self._labels = rows, texts, labels
        self._chosen = chosen  # the rows that these are; all that are chosen of the same share the rest

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Entries:
        """In their order; each is looked at once and not kept."""
        if isinstance(entries, Entries):
            return entries
        texts, labels = bytearray(), dict[str, int]()
        rows = np.fromiter((_row(entry, texts, labels) for entry in entries), ROW)
        return cls(rows, bytes(texts), list(labels), np.arange(len(rows), dtype=np.int32))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> Entries: ...
    def __getitem__(self, number: int | slice) -> Entry | Entries:
        if isinstance(number, slice):
            return Entries(self._rows, self._texts, self._labels, self._chosen[number])
        start, path, caption, label, group, split, has_alpha, width, height = self._rows[self._chosen[number]].item()
        return Entry(
            path=self._text(start, path),
            label=None if label < 0 else self._labels[label],
            caption=self._text(start + path, caption) if caption else None,
            group=group,
            split=SPLITS[split],
            has_alpha=has_alpha,
            width=width,
            height=height,
        )

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Entry.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as lists are

    def outside(self, hidden: Iterable[Split]) -> Entries:
        """Those that are in none of these splits."""
        return self._where(~np.isin(self._rows["split"], [SPLITS.index(split) for split in hidden]))

    def captioned(self) -> Entries:
        """Those that have a caption."""
        return self._where(self._rows["caption_bytes"] > 0)

    def pixels(self) -> int:
        """Of all of them together."""
        rows = self._rows[["width", "height"]][self._chosen]
        return int((rows["width"].astype(np.int64) * rows["height"]).sum())

    def _where(self, keep: NDArray[np.bool_]) -> Entries:
        """`keep`: for each row."""
        return Entries(self._rows, self._texts, self._labels, self._chosen[keep[self._chosen]])

    def _text(self, start: int, length: int) -> str:
        return self._texts[start : start + length].decode("utf-8", "surrogateescape")


def _row(entry: Entry, texts: bytearray, labels: dict[str, int]) -> tuple[int | bool, ...]:
    """The entry's row, its strings added to `texts` and its label to `labels`."""
    path, caption = (text.encode("utf-8", "surrogateescape") for text in (entry.path, entry.caption or ""))
    start = len(texts)
    texts += path
    texts += caption
    label = -1 if entry.label is None else labels.setdefault(entry.label, len(labels))
    split = SPLITS.index(entry.split)
    size = entry.width, entry.height
    return start, len(path), len(caption), label, entry.group, split, entry.has_alpha, *size
