"""One tar shard and its index: where in it each image, caption and label lies, so that any can be read by range.

Naming is WebDataset's: files that follow each other and share what comes before the first dot of their name are one
sample; `key.jpg` (or another image; `key.npy` if there is no other), `key.txt` its caption, `key.cls` its label, a
whole number. Anything else is passed over. An index is a line that says what it is, one of JSON (`Shard`), records
(RECORD), and the keys one after another.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from model import contract, storage
from model.data.errors import DataError
from model.data.patience import patiently
from model.data.splits import SPLITS, Split, split_of
from model.data_section import ARRAY_SUFFIXES

MAGIC = b"dinoctl shard index 1\n"
RECORD = np.dtype(
    [("image", "<i8"), ("image_bytes", "<i4"), ("caption", "<i8"), ("caption_bytes", "<i4"), ("label", "<i4"),
     ("key", "<i4")]
)  # fmt: skip
"""Offsets and sizes in bytes; caption_bytes 0: none; label -1: none; key: where in the keys it begins."""

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
LARGEST = 2**31 - 1
LONGEST_TOLD = 80
"""Characters of a key that a header surely holds whole, beside a suffix."""
GZIP = b"\x1f\x8b"
BLOCK = tarfile.BLOCKSIZE


class Shard(contract.Record, frozen=True):
    """What is known of one shard without its samples."""

    path: str
    bytes: int
    samples: int
    without_image: int = 0  # keys passed over, as no image goes with them
    damage: str = ""  # why what comes after the last sample cannot be read
    splits: tuple[int, ...] = ()  # samples in each of SPLITS, by their keys
    captioned: tuple[int, ...] = ()  # those of them that have a caption
    links: int = 0  # files passed over, as a tar holds no bytes of a link
    repeated: int = 0  # files passed over, as a later one of their sample has their name


@dataclass
class _Found:
    records: list[tuple[int, ...]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    splits: Counter[Split] = field(default_factory=Counter)
    captioned: Counter[Split] = field(default_factory=Counter)
    without_image: int = 0
    links: int = 0
    repeated: int = 0
    damage: str = ""


@dataclass(frozen=True)
class Samples:
    """The index of one shard in memory, for as long as its samples are read."""

    shard: Shard
    records: NDArray[np.void]
    keys: bytes

    def visible(self, hidden: Collection[Split], captioned: bool) -> NDArray[np.int64]:
        """The samples that are in none of the splits `hidden` and, with `captioned`, have a caption."""
        keep = self.records["caption_bytes"] > 0 if captioned else np.ones(len(self.records), bool)
        if hidden:
            names = [self._key(number).decode("utf-8", "surrogateescape") for number in range(len(self.records))]
            keep &= np.array([split_of(name) not in hidden for name in names], bool)
        return np.flatnonzero(keep)

    def key(self, number: int) -> str:
        """For people."""
        return self._key(number).decode("utf-8", "replace")

    def owns(self, header: bytes, number: int, size: int) -> bool:
        """Whether a tar's header is that of a file of the sample, of so many bytes. Else the shard was rewritten.

        Names of over a hundred bytes, or beyond ASCII, are in a header of their own and abridged in this one, each
        program in its way: of those the size alone is compared.
        """
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError:
            return False
        key = self._key(number).decode("utf-8", "surrogateescape")
        told = key.isascii() and len(key) < LONGEST_TOLD
        return found.size == size and (not told or found.name.startswith(f"{key}."))

    def _key(self, number: int) -> bytes:
        start = int(self.records[number]["key"])
        return self.keys[start : int(self.records[number + 1]["key"]) if number + 1 < len(self.records) else None]


def file_of(index: str, path: str, size: int) -> str:
    """Where in the folder `index` the index of a shard lies. A shard of another size is another shard."""
    name = hashlib.blake2b(f"{path}\0{size}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return f"{index}/{name[:2]}/{name[2:]}.idx"


# --- reading ----------------------------------------------------------------------------------------------------------


def head(file: str) -> Shard:
    """What an index says of its shard. Raises FileNotFoundError, DataError, StoreError."""
    return _head(storage.read(file, 0, 65536), file)[0]


def read(file: str) -> Samples:
    """A whole index. Raises FileNotFoundError, DataError, StoreError."""
    data = storage.read(file)
    shard, start = _head(data, file)
    stop = start + shard.samples * RECORD.itemsize
    if stop > len(data):
        raise DataError(f"{file}: the index is torn; remove it, and it is made again")
    return Samples(shard, np.frombuffer(data[start:stop], RECORD), data[stop:])


def _head(data: bytes, file: str) -> tuple[Shard, int]:
    end = data.find(b"\n", len(MAGIC))
    if not data.startswith(MAGIC) or end < 0:
        raise DataError(f"{file}: not an index of this version; remove it, and it is made again")
    return contract.decode(data[len(MAGIC) : end], Shard, file), end + 1


# --- making -----------------------------------------------------------------------------------------------------------


def ensure(index: str, path: str) -> Shard:
    """The shard's index, made unless it is there. Raises DataError if there is no such shard, StoreError."""
    size = _size(path)
    file = file_of(index, path, size)
    try:
        shard = head(file)
        if not shard.damage and not _is_newer(path, file):
            return shard
    except FileNotFoundError:
        pass
    return patiently(partial(_make, path, size, file))


def _is_newer(path: str, file: str) -> bool:
    """Whether a shard was written after its index, as far as where it lies says so. By its size it is the same one."""
    written = patiently(partial(storage.written, path))
    return written is not None and written > storage.modified(file)


def _size(path: str) -> int:
    def ask() -> int:
        try:
            return storage.size(path)
        except FileNotFoundError as error:
            raise DataError(f"data.path: no such tar shard: {path}") from error

    return patiently(ask)


def _make(path: str, size: int, file: str) -> Shard:
    with storage.reading(path) as opened:
        found = scan(opened, path, size)
    splits, captioned = (tuple(count[split] for split in SPLITS) for count in (found.splits, found.captioned))
    counts = len(found.records), found.without_image, found.damage, splits, captioned, found.links, found.repeated
    shard = Shard(path, size, *counts)
    records = np.array(found.records, RECORD)
    storage.replace(file, MAGIC + msgspec.json.encode(shard) + b"\n" + records.tobytes() + b"".join(found.keys))
    return shard


def scan(opened: BinaryIO, path: str, size: int) -> _Found:
    """Every sample of a tar of `size` bytes. Damage ends the scan and is said in `damage`. Raises StoreError."""
    found = _Found()
    with storage.foreign(path, "reading"):
        _scan(opened, size, found)
    return found


def _scan(opened: BinaryIO, size: int, found: _Found) -> None:
    ends = 0
    for key, members in groupby(_members(opened, size, found), key=lambda one: one[0]):
        parts: dict[str, tarfile.TarInfo] = {}
        for _, suffix, member in members:
            found.repeated += suffix in parts
            parts[suffix] = member
        image = _image(parts, contract.IMAGE_SUFFIXES) or _image(parts, ARRAY_SUFFIXES)
        if image is None:
            found.without_image += 1
            continue
        caption, label = parts.get("txt"), parts.get("cls")
        at = (caption.offset_data, caption.size) if caption else (0, 0)
        number = _label(opened, label) if label else -1
        found.records.append((image.offset_data, image.size, *at, number, ends))
        found.keys.append(key.encode("utf-8", "surrogateescape"))
        split = split_of(key)
        found.splits[split] += 1
        found.captioned[split] += at[1] > 0
        ends += len(found.keys[-1])


def _image(parts: Mapping[str, tarfile.TarInfo], suffixes: frozenset[str]) -> tarfile.TarInfo | None:
    """The first that is an image. A .npy is one where there is no other: beside one it is something else."""
    return next((part for suffix, part in parts.items() if f".{suffix}" in suffixes), None)


def _members(opened: BinaryIO, size: int, found: _Found) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix in lower case, and where it lies, of every file whose name has both."""
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                named = _NAME.fullmatch(member.name)
                if member.offset_data + member.size > size:
                    found.damage = f"it ends within {member.name}"
                    return
                if named and member.isreg() and not member.issparse() and member.size <= LARGEST:
                    yield named[1], named[2].lower(), member
                found.links += bool(named) and (member.issym() or member.islnk())
            found.damage = _behind(opened, tar.offset)
    except (tarfile.TarError, ValueError) as error:
        opened.seek(0)
        gzip = opened.read(len(GZIP)) == GZIP
        found.damage = "compressed with gzip: unpack it" if gzip else f"not a whole tar: {error}"


def _behind(opened: BinaryIO, end: int) -> str:
    """What is wrong with what comes after the last member: nothing but zeros should."""
    opened.seek(end)
    if opened.read(BLOCK).strip(b"\0"):
        return f"damaged at byte {end}"
    while rest := opened.read(1 << 20):
        if rest.strip(b"\0"):
            return f"more comes after its end at byte {end}: join tars with tar -A and not with cat"
    return ""


def _label(opened: BinaryIO, member: tarfile.TarInfo) -> int:
    """The whole number in a .cls; -1 if it holds anything else."""
    opened.seek(member.offset_data)
    text = opened.read(min(member.size, 32)).strip()
    return int(text) if text.isdigit() and int(text) <= LARGEST else -1
