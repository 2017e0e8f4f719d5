"""Names of many shards in one: `{000000..000123}` counts, `{a,b}` lists, `*` and `?` match what is there."""

from __future__ import annotations

import os
import re

from model import storage
from model.data.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_COUNT = re.compile(r"(\d+)\.\.(\d+)")
MOST = 10_000_000


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
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise DataError(f"data.path: {pattern}: a brace without its other; write x-{{000000..000123}}.tar")
        return [pattern]
    before, after = pattern[: found.start()], expand(pattern[found.end() :])
    words = _words(found.group(1), pattern)
    if len(words) * len(after) > MOST:
        raise DataError(f"data.path: {pattern} stands for more than {MOST:,} names")
    return [f"{before}{word}{rest}" for word in words for rest in after]


def _words(inside: str, pattern: str) -> list[str]:
    if counted := _COUNT.fullmatch(inside):
        first, last = counted.groups()
        if int(first) > int(last):
            raise DataError(f"data.path: {pattern}: {{{inside}}} counts down; the smaller number comes first")
        if int(last) - int(first) >= MOST:
            raise DataError(f"data.path: {pattern} stands for more than {MOST:,} names")
        width = len(first) if first.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise DataError(f"data.path: {pattern}: {{{inside}}} is neither a count ({{000..123}}) nor a list ({{a,b}})")


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
