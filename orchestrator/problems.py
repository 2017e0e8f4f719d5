"""What is wrong with a file that a user wrote: all of it at once, each mistake with its place and what is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

Path = tuple[str | int, ...]
"""Where in a YAML file: keys, and positions in lists."""


def dotted(path: Path) -> str:
    """`phases.highres.crops.resolutions[0].ratio`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Problem:
    """One mistake. `file` may also name an override of the command line, which has no line."""

    message: str  # what is wrong, in a few words
    at: Path = ()
    file: str = ""
    line: int | None = None  # the first line is 1
    found: str = ""
    allowed: str = ""
    hint: str = ""  # what to do

    @property
    def path(self) -> str:
        return dotted(self.at)

    @property
    def line_of_it(self) -> str:
        """`phases.gram.steps: not allowed here, found 0`."""
        return f"{self.path}: {self.message}" + (f", found {self.found}" if self.found else "")

    def placed(self, file: str, lines: Mapping[Path, int]) -> Problem:
        """The same problem in `file`, on the line of its path or of the nearest one above it that is written."""
        above = (self.at[:length] for length in range(len(self.at), 0, -1))
        return replace(self, file=file, line=next((lines[path] for path in above if path in lines), None))

    def as_mapping(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "message": self.message, "path": self.path, "file": self.file, "line": self.line,
            "found": self.found, "allowed": self.allowed, "hint": self.hint,
        }  # fmt: skip

    def __str__(self) -> str:
        place = self.file + (f":{self.line}" if self.line else "")
        head = ": ".join(part for part in (place, self.path, self.message) if part)
        details = (("found", self.found), ("allowed", self.allowed), ("hint", self.hint))
        return "\n".join([head, *(f"    {name}: {text}" for name, text in details if text)])


class SpecError(ValueError):
    """A spec, a cluster profile or an override is wrong. `problems` holds every mistake that was found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A hint with the known words closest to `word`; empty if none is close."""
    import difflib  # here, as a run that is not there is told without it

    near = difflib.get_close_matches(str(word), list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else ""


def listed(values: Sequence[object], most: int = 40) -> str:
    """`a, b, c`, cut at `most`."""
    text = ", ".join(str(value) for value in values[:most])
    return text + (f" ... ({len(values)} in all)" if len(values) > most else "")


def shown(value: object, most: int = 80) -> str:
    """A value as an error shows it: short, on one line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
