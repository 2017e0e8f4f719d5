"""How the resolved job comes about, as plain mappings: overrides on the file, then the top sections under each phase.

A section at the top of a job (`optim`, `data` ...) holds what every phase starts from; a phase overrides it field by
field. Every value keeps the place where it was written, so that a mistake is shown there and once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import PHASES
from orchestrator.problems import Path, Problem, SpecError, did_you_mean, dotted, listed, shown
from orchestrator.yaml_reader import Document, parse_value

SHARED = (
    "data", "optim", "crops", "augment", "losses", "ema", "official_quirks",
    "precision", "parallel", "resources", "checkpoints", "health",
)  # fmt: skip
"""What may stand at the top of a job as the default of every phase that has it."""

EVALUATE_SHARED = ("data", "health")
"""The evaluation takes these too; its resources are its own, as it runs in one process."""

_STEP = re.compile(r"([^.\[\]=]+)((?:\[[0-9]{1,4}\])*)")


@dataclass
class Source:
    """Where things were written. `origins`: a path of the merged job -> the path of the default it came from."""

    file: str
    lines: dict[Path, int]
    overrides: dict[Path, str] = field(default_factory=dict)
    origins: dict[Path, Path] = field(default_factory=dict)

    def forget_below(self, path: Path) -> None:
        """What was written under `path` is gone: an override has put something else there."""
        for places in (self.lines, self.overrides):
            for at in [at for at in places if len(at) > len(path) and at[: len(path)] == path]:
                del places[at]

    def place(self, problem: Problem) -> Problem:
        """The problem at the path where the value was written, with file and line, or with the override."""
        if problem.file:
            return problem
        at = self._written(problem.at)
        for length in range(len(at), 0, -1):
            if text := self.overrides.get(at[:length]):
                return replace(problem, at=at, file=f"override {text}", line=None)
            if line := self.lines.get(at[:length]):
                return replace(problem, at=at, file=self.file, line=line)
        return replace(problem, at=at, file=self.file)

    def _written(self, at: Path) -> Path:
        for length in range(len(at), 0, -1):
            if origin := self.origins.get(at[:length]):
                return (*origin, *at[length:])
        return at

    def place_all(self, problems: Iterable[Problem]) -> list[Problem]:
        """Each problem placed, none twice, in the order of the file. What several phases got wrong in the same words,
        and none of them wrote itself, is one problem of the section at the top."""
        problems = list(problems)
        shared = {(p.message, p.found, p.at[2:]) for p in problems if self._inherited(p)}
        counts = {key: sum((p.message, p.found, p.at[2:]) == key for p in problems) for key in shared}
        placed = []
        for problem in problems:
            if self._inherited(problem) and counts[problem.message, problem.found, problem.at[2:]] > 1:
                problem = replace(problem, at=problem.at[2:])
            placed.append(self.place(problem))
        unique: dict[tuple[object, ...], Problem] = {}
        for problem in placed:
            unique.setdefault((problem.at, problem.message, problem.found, problem.file), problem)
        return sorted(unique.values(), key=lambda p: (p.line is None, p.line or 0))

    def _inherited(self, problem: Problem) -> bool:
        at = problem.at
        top = at[:1] == ("phases",) and len(at) > 3 and at[2] in SHARED and (at[2],) in self.lines
        return top and at not in self.lines and at not in self.overrides


# --- overrides --------------------------------------------------------------------------------------------------------


def override(document: Document, file: str, texts: Iterable[str]) -> tuple[dict[str, Any], Source, list[Problem]]:
    """The document's values with each `a.b[0].c=value` laid over them, and the problems of those that cannot be."""
    values, source = copy.deepcopy(document.values), Source(file, dict(document.lines))
    problems: list[Problem] = []
    for text in texts:
        trial = copy.deepcopy(values)
        try:
            written = _override(trial, text)
        except SpecError as error:
            problems += error.problems
        else:
            values = trial
            source.forget_below(written[-1])
            source.overrides.update(dict.fromkeys(written, text))
    return values, source, problems


def _override(values: dict[str, Any], text: str) -> list[Path]:
    """Sets the value; the paths that were not there before, and the value's own."""
    path = override_path(text)
    value = parse_value(text.partition("=")[2], f"override {text}")
    here: Any = values
    written: list[Path] = []
    for depth, part in enumerate(path[:-1], start=1):
        if isinstance(here, dict) and isinstance(part, str) and here.get(part) is None:
            _may_create(values, path, depth, text)
            if isinstance(path[depth], int) and depth > 1:
                raise SpecError([_no_list(values, path, depth, text)])
            here[part] = {}
            written.append(path[:depth])
        here = _child(here, part, path, depth, text)
    if not (isinstance(here, dict) and isinstance(path[-1], str)):
        _child(here, path[-1], path, len(path), text)
    here[path[-1]] = value
    return [*written, path]


def override_path(text: str) -> Path:
    """The path of `a.b[0].c=value`. Raises SpecError if that is not what `text` is."""
    name, equals, _ = text.partition("=")
    path: list[str | int] = []
    for step in name.strip().split("."):
        match = _STEP.fullmatch(step)
        if match is None or not equals:
            raise SpecError([Problem("not an override", file=f"override {text}", found=text,
                                     allowed="path.to.key=value, e.g. phases.gram.steps=1000")])  # fmt: skip
        path += [match[1], *(int(index) for index in re.findall(r"[0-9]+", match[2]))]
    return tuple(path)


def _may_create(values: Mapping[str, Any], path: Path, depth: int, text: str) -> None:
    if path[0] == "phases" and depth == 2:
        known = [str(name) for name in values["phases"]] if isinstance(values["phases"], dict) else []
        raise SpecError([Problem("no such phase", path[:2], f"override {text}", found=str(path[1]),
                                 allowed=listed(known), hint=did_you_mean(path[1], known))])  # fmt: skip


def _no_list(values: Mapping[str, Any], path: Path, depth: int, text: str) -> Problem:
    """Of an item of a list that is not there; a phase, or the evaluation, may have it from the top of the job."""
    whole, value = f"{dotted(path[:depth])}=[...]", text.partition("=")[2]
    top = path[2:] if path[0] == "phases" else path[1:] if path[0] == "evaluate" else ()
    here: Any = values if top and top[0] in SHARED else None
    for part in top[: len(top) - len(path) + depth]:
        here = here.get(part) if isinstance(here, dict) else None
    if not isinstance(here, list):
        return _cannot(text, path[:depth], "no list is there", f"set it whole: {whole}")
    return _cannot(text, path[:depth], f"the list is inherited from {dotted(top[: len(top) - len(path) + depth])}",
                   f"set it there: {dotted(top)}={value}, or here the whole list: {whole}")  # fmt: skip


def _child(here: Any, part: str | int, path: Path, depth: int, text: str) -> Any:
    if isinstance(here, dict) and isinstance(part, str):
        return here[part]
    if isinstance(here, list) and isinstance(part, int):
        if part < len(here):
            return here[part]
        raise SpecError([_cannot(text, path[:depth], f"the list has {len(here)} items, counted from 0", "")])
    if isinstance(here, list):
        raise SpecError([_cannot(text, path[: depth - 1], "a list is there", "write [0] for its first item")])
    there = "a mapping is there" if isinstance(here, dict) else f"it is {shown(here)} in the file"
    raise SpecError([_cannot(text, path[: depth - 1], there, "set it whole")])


def _cannot(text: str, at: Path, why: str, hint: str) -> Problem:
    return Problem(f"cannot be set: {why}", at, f"override {text}", hint=hint)


# --- the sections at the top ------------------------------------------------------------------------------------------


def merge(values: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], list[Problem]]:
    """The job with each top section laid under the phases that have it and gone from the top.

    `source.origins` learns where each inherited value is from. Problems: a top section that no phase takes, an override
    that reaches none.
    """
    job = {key: value for key, value in values.items() if key not in SHARED}
    used: set[str] = set()
    phases = job.get("phases")
    if isinstance(phases, dict):
        job["phases"] = {
            name: _under(values, phase, ("phases", name), _shared_of(phase), source, used)
            for name, phase in phases.items()
        }
    if isinstance(job.get("evaluate"), dict):
        job["evaluate"] = _under(values, job["evaluate"], ("evaluate",), EVALUATE_SHARED, source, used)
    unused = [section for section in SHARED if section in values and section not in used]
    kinds_known = isinstance(phases, dict) and all(_shared_of(phase) for phase in phases.values())
    return job, [*map(_unused, unused), *_without_effect(values, source, used)] if kinds_known else []


def _shared_of(phase: Any) -> tuple[str, ...]:
    kind = phase.get("kind") if isinstance(phase, dict) else None
    fields = PHASES[kind].model_fields if isinstance(kind, str) and kind in PHASES else {}
    return tuple(section for section in SHARED if section in fields)


def _unused(section: str) -> Problem:
    kinds = [kind for kind, phase in PHASES.items() if section in phase.model_fields]
    return Problem("no phase of this job takes it", (section,), allowed=f"phases of kind {listed(kinds)}",
                   hint="remove the section")  # fmt: skip


def _without_effect(values: Mapping[str, Any], source: Source, used: set[str]) -> Iterator[Problem]:
    """Overrides of what every phase sets for itself: the run would be the same without them."""
    inherited = set(source.origins.values())
    for text in dict.fromkeys(source.overrides.values()):
        path = override_path(text)
        if len(path) == 1 and isinstance(values.get(str(path[0])), dict):
            continue  # it put away what else was in the section
        if path[0] in used and not any(origin[: len(path)] == path[: len(origin)] for origin in inherited):
            yield Problem("without effect: every phase sets its own", path, f"override {text}",
                          hint=f"set it there: phases.<phase>.{dotted(path)}=...")  # fmt: skip


def _under(values: Mapping[str, Any], own: Any, at: Path, shared: Iterable[str], source: Source, used: set[str]) -> Any:
    if not isinstance(own, dict):
        return own
    merged = dict(own)
    for section in shared:
        if section in values:
            used.add(section)
            merged[section] = _overlay(values[section], own, section, (section,), (*at, section), source)
    return merged


def _overlay(default: Any, own: Mapping[str, Any], key: str, from_: Path, at: Path, source: Source) -> Any:
    """`own[key]` over `default`: mappings field by field, anything else whole; null is a value like another."""
    if key not in own:
        source.origins[at] = from_
        return default
    mine = own[key]
    if not (isinstance(default, dict) and isinstance(mine, dict)):
        return mine
    inherited = {
        name: _overlay(value, mine, name, (*from_, name), (*at, name), source) for name, value in default.items()
    }
    return {**inherited, **{name: value for name, value in mine.items() if name not in default}}
