"""What lies where a `data.path` says, as far as this machine can see: folders of images, tar shards, captions."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath

from model import contract, storage
from orchestrator.problems import Problem, listed

_FIRST = re.compile(r"\{([^{}]*?)(?:\.\.|,)[^{}]*\}")


def shards(patterns: Sequence[str]) -> Problem | None:
    """Of each pattern of local files the first that it names, or any that a glob matches, is looked for; of a URI only
    whether something installed here can read it."""
    for pattern in patterns:
        if storage.is_uri(pattern) and (why := storage.unknown(pattern)):
            return Problem(f"a URI that nothing here can read ({why})", found=pattern, allowed=storage.KNOWN)
        name = os.path.expanduser(_FIRST.sub(r"\1", pattern))
        if not storage.is_uri(pattern) and next(glob.iglob(name), None) is None:
            return Problem("no such tar shard", found=pattern if name == pattern else f"{pattern} ({name})",
                           allowed="tar files, globs of them, or x-{000000..000123}.tar",
                           hint="`dinoctl data pack` makes some from a folder of images")  # fmt: skip
    return None


def folder(path: str, suffixes: frozenset[str]) -> Problem | None:
    if storage.is_uri(path):
        return None
    folder = contract.data_folder(path)
    found = path if str(folder) == path else f"{path} ({folder})"
    hint = "any folder of images does: data.path=FOLDER"
    if path.startswith("cache:"):
        hint = f"`make data` fetches the demo's images, `make data_long` the longer demo's; {hint}"
    if why := _why_not(folder):
        return Problem(why, found=found, hint=hint)
    if not has_image(folder, suffixes):
        return Problem("no images in the data folder", found=found, hint=hint,
                       allowed=f"files ending in {listed(sorted(suffixes))}")  # fmt: skip
    return None


def _why_not(folder: FilePath) -> str:
    """Why the folder cannot be listed; empty if it can."""
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, ValueError):  # ValueError: no path at all, with a null byte in it
        return "no such data folder"
    except NotADirectoryError:
        return "not a folder" if os.path.exists(folder) else "no such data folder"
    except OSError as error:
        return f"the data folder cannot be listed: {(error.strerror or str(error)).lower()}"
    return ""


def has_image(folder: FilePath, suffixes: frozenset[str]) -> bool:
    return next(images(folder, suffixes), None) is not None


def images(folder: FilePath, suffixes: frozenset[str]) -> Iterator[FilePath]:
    """Looks as the index of the images will, one after the other: to find the first of millions takes no longer. Links
    to folders are followed, as `model.data.files.walk` does, but for one to a folder that the way to it leads through.
    """
    over: dict[str, frozenset[tuple[int, int]]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        try:
            here = os.stat(place)
        except OSError:  # gone meanwhile
            folders.clear()
            continue
        above, this = over.pop(place, frozenset()), (here.st_dev, here.st_ino)
        if this in above:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        over.update((os.path.join(place, name), above | {this}) for name in folders)
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield FilePath(place, name)


def has_caption(image: FilePath) -> bool:
    """As the index reads it: the first line of the text beside the image."""
    try:
        with image.with_suffix(".txt").open(encoding="utf-8", errors="replace") as text:
            return bool(text.readline().strip())
    except OSError:
        return False
