"""The index of a folder of images: what is there, what is alike, what training may see. Built once a run.

    build_or_read(data, run_dir, tell) -> Index     every rank and the evaluation read the same one
    training_entries(index, data) -> Entries        in index order; the order of training is drawn over these
    entries_of(index, split) -> list[Entry]

The index of a run is never made again: images that come later are not seen, those that go missing count as unreadable.
So the order of the data, and with it a resumed run, does not depend on what happens to the folder meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from model import config, contract, storage
from model.data import duplicates, files
from model.data.entries import Entries as Entries, Entry as Entry
from model.data.errors import DataError, Skipped, UnreadableImageError
from model.data.images import decode_with_alpha
from model.data.patience import patiently
from model.data.skips import MOST_NAMES, too_many
from model.data.splits import HIDDEN, Split, split_of
from model.data.threads import Tell, cores, in_threads, untold

log = logging.getLogger(__name__)

LOOKED_AT = "looked at %s of %s images"
"""What `tell` is told of, for the log."""

COMPARE_AT_MOST = 20_000
"""Images past which only equal files are grouped: comparing each with each grows with the square."""

CAPTION = ".txt"
LONGEST_CAPTION = 10_000
"""Letters that are looked at."""

VERSION = 1


class Index(contract.Record, frozen=True):
    """All images of a folder. `grouping` says how near-duplicates were found."""

    root: str
    grouping: Literal["likeness", "equal files"]
    entries: Sequence[Entry]  # sorted by path
    skipped: list[Skipped]

    @property
    def holds(self) -> str:
        """For messages."""
        return f"{len(self.entries) + len(self.skipped)} images"


# --- reading ----------------------------------------------------------------------------------------------------------


def build_or_read(data: config.Data, run_dir: str, tell: Tell) -> Index:
    """The run's index of `data.path`, made if this is the first to ask; two at once agree on the first one published.

    Raises DataError if the folder is missing or holds no image that can be read, BadDataError if too many cannot,
    StoreError.
    """
    if data.shards or not isinstance(data.path, str):
        raise DataError(f"data.path: {data.shown}: these are tar shards; an evaluation looks at a folder of images")
    root = contract.data_folder(data.path).absolute()
    key = f"{VERSION}\0{root}\0{data.background}"
    if not data.photographs:
        key += f"\0{data.channels} x {data.bits} bits"
    path = f"{run_dir}/data/index-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    index = build(folder(data.path), data, tell)
    check_skip_rate(index, data.max_skip_rate)  # before it is published: a repaired folder is looked at anew
    try:
        storage.publish(path, contract.encode(index))
    except storage.AlreadyPublished:
        return _read(path)
    return msgspec.structs.replace(index, entries=Entries.of(index.entries))


class _Stored(contract.Record, frozen=True):
    """An Index as its file holds it, each entry still as JSON."""

    root: str
    grouping: Literal["likeness", "equal files"]
    entries: list[msgspec.Raw]
    skipped: list[Skipped]


def _read(path: str) -> Index:
    """The index in a file. Entry by entry, so that at no time all of them are objects."""
    stored = contract.decode(storage.read(path), _Stored, path)
    return Index(
        root=stored.root,
        grouping=stored.grouping,
        entries=Entries.of(_decoded(stored.entries, path)),
        skipped=stored.skipped,
    )


def _decoded(entries: list[msgspec.Raw], path: str) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    for number, entry in enumerate(entries):
        try:
            yield decoder.decode(entry)
        except msgspec.ValidationError as error:
            raise contract.ContractError(
                f"{path}: not an Index that this version of dinoctl writes: entry {number}: {error}"
            ) from error


def training_entries(index: Index, data: config.Data) -> Entries:
    """What training sees under `data.hold_out`. Raises DataError if nothing is left, BadDataError if too many images
    of the folder are unreadable."""
    check_skip_rate(index, data.max_skip_rate)
    entries = Entries.of(index.entries).outside(HIDDEN[data.hold_out])
    if not entries:
        raise DataError(
            f"data.hold_out: with {data.hold_out!r} none of the {len(index.entries)} images under {index.root} are "
            "left to train on; give more images, or hold_out: none"
        )
    return entries


def entries_of(index: Index, split: Split) -> list[Entry]:
    """The images of one split, in index order."""
    return [entry for entry in index.entries if entry.split == split]


def check_skip_rate(index: Index, most: float) -> None:
    """Raises BadDataError if more than the share `most` of the folder's images are unreadable."""
    count, total = len(index.skipped), len(index.entries) + len(index.skipped)
    if count > most * total:
        raise too_many(count, f"of {total:,} images under {index.root}", most, index.skipped[-MOST_NAMES:])


def folder(path: str) -> Path:
    """The folder that `data.path` means, absolute. Raises DataError if it is not there."""
    root = contract.data_folder(path).absolute()
    if root.is_dir():
        return root
    if path.startswith("cache:"):
        fetched = "`make data` fetches the demo's images, `make data_long` the longer demo's"
        raise DataError(f"data.path: {path}: {root} is not there; {fetched}")
    raise DataError(f"data.path: no such folder: {root}")


# --- building ---------------------------------------------------------------------------------------------------------


def build(root: Path, data: config.Data, tell: Tell) -> Index:
    """Look at every image under `root`. Raises DataError if there is none, or none that can be read."""
    paths, closed = list_all(root, data.suffixes, tell)
    if not paths:
        endings = ", ".join(sorted(data.suffixes))
        raise DataError(
            f"data.path: no images under {root} (looked for {endings} in all its folders){closed_too(closed)}"
        )
    compare = len(paths) <= COMPARE_AT_MOST
    looks = []
    for look in in_threads(lambda path: _look(root / path, root, data, compare), paths, min(16, cores())):
        looks.append(look)
        tell(len(looks), len(paths))
    skipped = [Skipped(path=p, reason=look) for p, look in zip(paths, looks, strict=True) if isinstance(look, str)]
    read = [(path, look) for path, look in zip(paths, looks, strict=True) if not isinstance(look, str)]
    if not read:
        first = skipped[0]
        raise DataError(
            f"data.path: none of the {len(paths)} images under {root} can be read; {first.path}: {first.reason}"
        )
    entries = _entries([path for path, _ in read], [look for _, look in read])
    grouping: Literal["likeness", "equal files"] = "likeness" if compare else "equal files"
    return Index(root=str(root), grouping=grouping, entries=entries, skipped=[*skipped, *closed])


def _entries(paths: list[str], looks: list[_Look]) -> list[Entry]:
    groups = _groups(paths, looks)
    first_path: dict[int, str] = {}
    for path, group in zip(paths, groups, strict=True):
        first_path.setdefault(group, path)
    return [
        Entry(
            path=path,
            label=path.split("/")[0] if "/" in path else None,
            caption=look.caption,
            group=group,
            split=split_of(first_path[group]),
            has_alpha=look.has_alpha,
            width=look.size[0],
            height=look.size[1],
        )
        for path, look, group in zip(paths, looks, groups, strict=True)
    ]


def list_images(root: Path, suffixes: frozenset[str] = contract.IMAGE_SUFFIXES, tell: Tell = untold) -> list[str]:
    """Relative paths of the files under `root` whose names end like an image's, sorted; hidden ones left out. `tell` is
    told after each folder that none of those found so far was looked at. Raises StoreError: what cannot be listed would
    be missing without a word. The log counts the files with other endings (`.heic`, say)."""
    return list_all(root, suffixes, tell)[0]


def list_all(root: Path, suffixes: frozenset[str], tell: Tell = untold) -> tuple[list[str], list[Skipped]]:
    """As `list_images`, and the folders that are not ours to list, each of which counts as one unreadable image."""
    return patiently(lambda: _list(root, suffixes, tell))


def _list(root: Path, suffixes: frozenset[str], tell: Tell) -> tuple[list[str], list[Skipped]]:
    closed: list[Skipped] = []

    def cannot(error: OSError) -> None:
        if error.errno in files.FORBIDDEN and Path(error.filename) != root:
            name = Path(error.filename).relative_to(root).as_posix()
            closed.append(Skipped(path=name, reason=f"a folder that may not be listed: {error.strerror}"))
        elif error.errno != errno.ENOENT:
            raise files.failed(error, "listing", error.filename) from error

    found: list[str] = []
    others: Counter[str] = Counter()
    for place, names in files.walk(root, cannot):
        within = Path(place).relative_to(root)
        endings = {name: os.path.splitext(name)[1].lower() for name in names}
        found += [(within / name).as_posix() for name, ending in endings.items() if ending in suffixes]
        others.update(ending for ending in endings.values() if ending not in suffixes | {"", CAPTION})
        tell(0, len(found))
    if others:
        named = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
        log.warning("passed over in %s, as their names do not end like an image's: %s", root, named)
    return sorted(found), closed


def closed_too(closed: list[Skipped]) -> str:
    """What to add where no image was found, of folders that may not be listed."""
    return f"; {closed[0]}" if closed else ""


class _Look(msgspec.Struct, frozen=True):
    size: tuple[int, int]
    has_alpha: bool
    caption: str | None
    thumbnail: NDArray[np.float32] | None
    content: str


def _look(path: Path, root: Path, data: config.Data, compare: bool) -> _Look | str:
    """What the index keeps of one image, or why it cannot be read. Raises StoreError: the index is for good, and a
    store that fails is not to be in it."""
    try:
        content = files.read(path, root)
        picture, opacity = decode_with_alpha(content, data)
        caption = read_caption(path.with_suffix(CAPTION))
    except UnreadableImageError as error:
        return str(error)
    return _Look(
        size=(picture.shape[1], picture.shape[0]),
        has_alpha=opacity is not None,
        caption=caption,
        thumbnail=duplicates.thumbnail(picture) if compare else None,
        content=hashlib.blake2b(content, digest_size=16).hexdigest(),
    )


def read_caption(file: Path) -> str | None:
    """The first line, None if there is none. Raises UnreadableImageError, which is its image's, too, and StoreError."""
    try:
        head = files.head(file, 4 * LONGEST_CAPTION)  # a letter has four bytes at most
    except UnreadableImageError as error:
        raise UnreadableImageError(f"its caption {file.name}: {error}") from error
    lines = io.TextIOWrapper(io.BytesIO(head or b""), encoding="utf-8", errors="replace")
    return lines.readline(LONGEST_CAPTION).strip() or None


def _groups(paths: list[str], looks: list[_Look]) -> list[int]:
    contents = [look.content for look in looks]
    thumbnails = [look.thumbnail for look in looks if look.thumbnail is not None]
    if len(thumbnails) < len(looks):
        return duplicates.equal(contents)
    return duplicates.near_duplicates(paths, contents, np.stack(thumbnails))
