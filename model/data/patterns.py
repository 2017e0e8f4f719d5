"""Names of many shards in one: `{000000..000123}` counts, `{a,b}` lists, `*` and `?` match what is there."""

from __future__ import annotations

import os
import re

from model import storage
from model.data.errors import DataError
from model.data_section import BRACES, COUNT, check_braces


def absolute(pattern: str) -> str:
    """A pattern of local files from the root on, so that it means the same wherever it is read; a URI as it is."""
    return pattern if storage.is_uri(pattern) else os.path.abspath(os.path.expanduser(pattern))


_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/([^/].*)?")


def refuse_one_slash(target: str) -> None:
    """Raises DataError for what would be written to a folder named `s3:`, and was hardly meant so."""
    if found := _ONE_SLASH.fullmatch(target):
        scheme, rest = found.groups(default="")
        raise DataError(
            f"{target}: one slash makes a folder of it; write {scheme}://{rest}, or ./{target} for the folder"
        )


def expand(pattern: str) -> list[str]:
    """The names that the braces of a pattern stand for, in order. Raises DataError for braces that say nothing."""
    try:
        check_braces(pattern)
    except ValueError as error:
        raise DataError(f"data.path: {error}") from error
    return _expanded(pattern)


def _expanded(pattern: str) -> list[str]:
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], _expanded(pattern[found.end() :])
    return [f"{before}{word}{rest}" for word in _words(found[1]) for rest in after]


def _words(inside: str) -> list[str]:
    counted = COUNT.fullmatch(inside)
    if counted is None:
        return inside.split(",")
    first, last = counted.groups()
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def locate(patterns: list[str]) -> list[str]:
    """Every shard that the patterns name, in their order; what globs match is sorted. Asks the store for globs only.

    Raises DataError for a glob without a match and for a shard that is named twice, StoreError.
    """
    found: list[str] = []
    for pattern in patterns:
        for name in expand(pattern):
            if not any(mark in name for mark in "*?["):
                found.append(name)
            elif matches := storage.matching(name):
                found += matches
            else:
                raise DataError(f"data.path: no tar shard matches {name}")
    if len(set(found)) < len(found):
        seen: set[str] = set()
        twice = next(name for name in found if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"data.path: {twice} is named twice")
    return found
