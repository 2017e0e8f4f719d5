"""The images that had to be replaced while training: counted, the last ones named, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from model.data.errors import BadDataError, Skipped

MOST_NAMES = 5
MOST_REMEMBERED = 100_000
"""Different images by name: some 20 MB. Where more are unreadable, the rest are counted each time."""

FEWEST = 10_000
"""Images that must have been due, or all that there are, before a share of them is judged: fewer say too little."""


@dataclass
class Skips:
    """`replaced`: how often one was due; `count`: how many different ones, as far as they are remembered."""

    replaced: int = 0
    count: int = 0
    last: deque[Skipped] = field(default_factory=lambda: deque(maxlen=MOST_NAMES))
    _known: set[str] = field(default_factory=set)

    @property
    def named(self) -> str:
        """The last ones, for a person."""
        return ", ".join(f"{one.path} ({one.reason})" for one in self.last)

    def add(self, skipped: Iterable[Skipped]) -> None:
        for one in skipped:
            self.replaced += 1
            if one.path in self._known:
                continue
            self.count += 1
            self.last.append(one)
            if len(self._known) < MOST_REMEMBERED:
                self._known.add(one.path)


def are_too_many(replaced: int, due: int, total: int, left_out: int, most: float) -> bool:
    """Whether the images that were `due` and had to be `replaced` (both are all ranks') are, with those that an index
    `left_out`, more than the share `most` (`data.max_skip_rate`). total: the images there are beside those."""
    share = left_out / (total + left_out)
    return replaced > 0 and replaced > (most - share) * max(due, min(total, FEWEST))


def too_many(count: int, of: str, most: float, last: Iterable[Skipped | str]) -> BadDataError:
    """`last`: some of them by name."""
    named = "\n".join(f"  {one}" for one in last)
    return BadDataError(
        f"{count:,} {of} are unreadable, more than data.max_skip_rate ({most:g}) allows; repair or remove them, "
        f"or raise it\nThe last of them:\n{named}"
    )
