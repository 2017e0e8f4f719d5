"""`dinoctl data pack`: a folder of images as tar shards, named as in WebDataset, in a folder or on a bucket.

The images are shuffled first, so that each shard holds a bit of everything. The same folder gives the same bytes.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from model import storage
from model.contract import IMAGE_SUFFIXES
from model.data import files
from model.data.errors import DataError, UnreadableImageError
from model.data.index import folder, list_all
from model.data.patience import patiently
from model.data.patterns import absolute, refuse_one_slash
from model.data.threads import Tell
from model.draws import generator

CLASSES = "classes.txt"
PATTERN_MARKS = "*?[]{}"
"""What `data.path` reads as a pattern (`model.data.patterns`)."""

REPAIR = "repair or remove it, as a shard has to hold it"


@dataclass(frozen=True)
class Packed:
    pattern: str  # what `data.path` is to be
    images: int
    shards: int
    classes: int


def pack(
    source: str,
    target: str,
    name: str,
    images_per_shard: int,
    seed: int,
    tell: Tell,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
) -> Packed:
    """Write the images under `source`, with captions and labels, as `target`/`name`-000000.tar and so on.
    `suffixes`: how the names of images end.

    `target` is a folder or a URI. A label is the place of its first-level folder in classes.txt, from 0. Raises
    DataError for a folder that is not there, holds no image or one that cannot be read, and for a target that holds
    shards of that name or other classes, or is no place for them, OSError.
    """
    root, out = folder(source), _place(target, name)
    paths, closed = list_all(root, suffixes)
    if closed:
        raise DataError(f"{root / closed[0].path}: {closed[0].reason}; {REPAIR}")
    if not paths:
        raise DataError(f"no images under {root}")
    count = -(-len(paths) // images_per_shard)
    if there := storage.matching(f"{out}/{name}-*.tar"):
        raise DataError(f"{there[0]} is there already: remove it, or take another folder or --name")
    labels = _labels(paths)
    if labels:
        _write_classes(labels, f"{out}/{CLASSES}")
    keys = _keys(paths)
    order = generator(seed, "pack").permutation(len(paths)).tolist()
    done = 0
    for shard in range(count):
        part = [paths[number] for number in order[shard * images_per_shard : (shard + 1) * images_per_shard]]
        with _whole(f"{out}/{name}-{shard:06d}.tar") as file:
            _write(file, root, [(keys[path], root / path, _label(path, labels)) for path in part])
        done += len(part)
        tell(done, len(paths))
    last = f"-{{000000..{count - 1:06d}}}" if count > 1 else "-000000"
    return Packed(f"{out}/{name}{last}.tar", len(paths), count, len(labels))


def _place(target: str, name: str) -> str:
    """The folder or URI that `target` means. Raises DataError if it cannot hold shards, or none that can be named."""
    refuse_one_slash(target)
    out = absolute(target).rstrip("/")
    for what, text in (("", out), ("--name ", name)):
        if marks := [mark for mark in PATTERN_MARKS if mark in text]:
            raise DataError(
                f"{what}{text}: holds {' and '.join(marks)}, which in a data.path stand for other names, so that the "
                f"shards could not be read by theirs; take one without any of {' '.join(PATTERN_MARKS)}"
            )
    here = out.removeprefix("file://")
    if not storage.is_uri(here):
        _refuse_file(Path(here))
    return out


def _refuse_file(out: Path) -> None:
    for place in (out, *out.parents):
        if os.path.lexists(place) and not os.path.isdir(place):
            raise DataError(f"{place} is a file, and shards go into a folder: name one, there already or new")


def _write_classes(labels: dict[str, int], file: str) -> None:
    """Raises DataError if other classes are there: the labels of the shards beside them would change their meaning."""
    classes = "".join(f"{label}\n" for label in labels).encode("utf-8", "surrogateescape")
    if storage.matching(file):
        with storage.reading(file) as there:
            if there.read() == classes:
                return
        raise DataError(
            f"{file} holds other classes, which the labels of shards there go by: take another folder, or remove it if "
            "there are none"
        )
    with _whole(file) as new:
        new.write_bytes(classes)


def _labels(paths: list[str]) -> dict[str, int]:
    """Every first-level folder and its number."""
    names = sorted({path.split("/")[0] for path in paths if "/" in path})
    return {name: number for number, name in enumerate(names)}


def _label(path: str, labels: dict[str, int]) -> int | None:
    return labels[path.split("/")[0]] if "/" in path else None


def _keys(paths: list[str]) -> dict[str, str]:
    """A key for each path: itself without its suffix, dots replaced, as a key ends at the first dot of its name."""
    taken: set[str] = set()
    keys = {}
    for path in paths:
        pure = PurePosixPath(path)
        wanted = (pure.parent / pure.stem.replace(".", "_")).as_posix()
        key, again = wanted, 1
        while key in taken:
            again += 1
            key = f"{wanted}-{again}"
        taken.add(key)
        keys[path] = key
    return keys


@contextmanager
def _whole(target: str) -> Iterator[Path]:
    """A file of this machine to write, which then becomes `target`, whole or not at all. Raises OSError."""
    if storage.is_uri(target):
        with tempfile.TemporaryDirectory(prefix="dinoctl-pack-") as scratch:
            file = Path(scratch, "shard")
            yield file
            patiently(partial(storage.put, file, target))
        return
    here = Path(target)
    here.parent.mkdir(parents=True, exist_ok=True)
    temporary = here.with_name(f".{here.name}.tmp")
    try:
        yield temporary
        temporary.rename(here)
    finally:
        temporary.unlink(missing_ok=True)


def _write(shard: Path, root: Path, samples: list[tuple[str, Path, int | None]]) -> None:
    with tarfile.open(shard, "w") as tar:
        for key, image, label in samples:
            for suffix, data in _files(image, root, label):
                member = tarfile.TarInfo(f"{key}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _files(image: Path, root: Path, label: int | None) -> Iterator[tuple[str, bytes]]:
    yield image.suffix.lower(), _content(image, root)
    caption = image.with_suffix(".txt")
    if caption.is_file():
        yield ".txt", _content(caption, root)
    if label is not None:
        yield ".cls", str(label).encode()


def _content(file: Path, root: Path) -> bytes:
    try:
        return files.read(file, root)
    except UnreadableImageError as error:
        raise DataError(f"{file}: {error}; {REPAIR}") from error
