"""Pydantic's errors in a user's words: place, what was found, what is allowed, what was probably meant."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError

from model.config import Schedule, Section
from orchestrator.problems import Path, Problem, did_you_mean, dotted, listed, shown

S = TypeVar("S", bound=Section)


def validate(kind: type[S], values: Any, at: Path) -> tuple[S | None, list[Problem]]:
    """`values` as a section, and every problem with them. `at`: where they stand in the file.

    Where there are problems, the section is what the rest makes, without the values that are wrong, so that checks
    across sections can go on; None if the rest makes none.
    """
    try:
        return kind.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        found = [_placed(kind, values, detail) for detail in details if not _only_its_items(detail)]
        missing = {detail["loc"] for detail, _ in found if detail["type"] == "missing"}
        told = [(_problem(kind, detail, at, missing), None if of is None else (*at, *of)) for detail, of in found]
        return _without(kind, values, [tuple(detail["loc"]) for detail in details]), _once(told)


def _only_its_items(detail: Any) -> bool:
    """Of a list, all of whose items are wrong, pydantic says that it is too short: it counts those that are right."""
    return detail["type"] == "too_short" and bool(len(detail["input"]) >= detail["ctx"]["min_length"])


def _placed(kind: type[Section], values: Any, detail: Any) -> tuple[Any, Path | None]:
    """The detail at its place in the file, without the names that pydantic gives to the branches of a union, and where
    that union stands if one of its branches said this."""
    loc, here = detail["loc"], json.loads(json.dumps(values))
    place: Path = ()
    union: Path | None = None
    for number, part in enumerate(loc, start=1):
        section = section_at(kind, place)
        named = number == len(loc) and detail["type"] in ("missing", "extra_forbidden")
        written = isinstance(here, dict) and part in here
        if not (named or written or isinstance(part, int) or (section and part in section.model_fields)):
            union = place if union is None else union
            continue
        place = (*place, part)
        item = isinstance(here, list) and isinstance(part, int) and part < len(here)
        here = here[part] if written or item else None
    return {**detail, "loc": place}, union


def _once(told: list[tuple[Problem, Path | None]]) -> list[Problem]:
    """What the branches of one union say of a place as one problem; of what lies within, if a branch says that, alone.

    told: each problem, and where the union stands if it is one of a branch's.
    """
    looked_into = {union for problem, union in told if union is not None and problem.at != union}
    merged: dict[object, Problem] = {}
    for number, (problem, union) in enumerate(told):
        if union in looked_into and problem.at == union:
            continue
        key = number if union is None else (union, problem.at, problem.message, problem.found)
        if (before := merged.get(key)) is None:
            merged[key] = problem
        elif problem.allowed not in before.allowed:
            allowed = ", or ".join(filter(None, (before.allowed, problem.allowed)))
            merged[key] = replace(before, allowed=allowed, hint=before.hint or problem.hint)
    return list(merged.values())


def _without(kind: type[S], values: Any, wrong: list[Path]) -> S | None:
    rest = json.loads(json.dumps(values))
    for loc in wrong:
        here = rest
        for part in loc[:-1]:
            here = here[part] if isinstance(here, dict) and part in here else None
        if isinstance(here, dict) and loc:
            here.pop(loc[-1], None)
    try:
        return kind.model_validate_json(json.dumps(rest))
    except ValidationError:
        return None


def _problem(kind: type[Section], detail: Any, at: Path, missing: Set[Path]) -> Problem:
    loc: Path = tuple(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(kind, loc, at, missing)
        case "missing":
            return Problem("missing", (*at, *loc), allowed=_description(kind, loc))
        case "value_error":
            return Problem(str(detail["ctx"]["error"]), (*at, *loc))
    found = shown(detail["input"])
    allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    hint = ""
    if detail["type"] == "literal_error":
        allowed = detail["ctx"]["expected"]
        hint = did_you_mean(detail["input"], [word.strip("'") for word in allowed.replace(" or ", ", ").split(", ")])
    elif detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        inner = section_at(kind, loc)
        allowed = f"a section with {listed(list(inner.model_fields))}" if inner else "a section"
        if inner is Schedule:
            allowed, hint = f"a number, or {allowed}", _unquoted(detail["input"])
    elif detail["type"] == "too_short":
        allowed = f"at least {detail['ctx']['min_length']} of them"
    elif detail["type"] == "string_pattern_mismatch":
        allowed = _description(kind, loc)
    elif detail["type"] == "string_type" and not isinstance(detail["input"], dict | list | None):
        hint = "put it in quotes"
    elif isinstance(detail["input"], str) and detail["input"].replace("_", "").isdigit():
        hint = f"write {detail['input'].replace('_', '')}, without quotes or underscores"
    return Problem("not allowed here", (*at, *loc), found=found, allowed=allowed, hint=hint)


def _unquoted(text: Any) -> str:
    try:
        return f"write {float(text):g}, without quotes" if isinstance(text, str) else ""
    except ValueError:
        return ""


def _unknown_key(kind: type[Section], loc: Path, at: Path, missing: Set[Path]) -> Problem:
    """The hint is what has a name like it beside it; then the same name below; then what alone is missing beside it;
    then the same name anywhere."""
    section, key = section_at(kind, loc[:-1]), str(loc[-1])
    fields = list(section.model_fields) if section else []
    here = tuple(part for part in loc[:-1] if isinstance(part, str))
    elsewhere = [path for path in field_paths(kind) if path[-1] == key]
    below = [dotted((*at, *path)) for path in elsewhere if path[: len(here)] == here]
    beside = [str(path[-1]) for path in missing if path[:-1] == loc[:-1]]
    likely = below or (beside if len(beside) == 1 else [dotted((*at, *path)) for path in elsewhere])
    hint = did_you_mean(key, fields) or (f"did you mean {likely[0]}?" if likely else "")
    return Problem("unknown key", (*at, *loc), found=key, allowed=listed(fields), hint=hint)


def _description(kind: type[Section], loc: Path) -> str:
    section = section_at(kind, loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    if field is None:
        return ""
    inner = next(iter(_sections(field.annotation)), None)
    keys = f"a section with {listed(list(inner.model_fields))}" if inner else ""
    return field.description or keys


def section_at(kind: type[Section], loc: Path) -> type[Section] | None:
    """The section that stands at `loc` of a `kind`, past optional fields and lists; None if there is none."""
    section: type[Section] | None = kind
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = next(iter(_sections(field.annotation)), None) if field else None
    return section


def field_paths(kind: type[Section]) -> Iterator[Path]:
    """The path of every field under a section, the shallow ones first."""
    level: list[tuple[Path, type[Section]]] = [((), kind)]
    while level:
        yield from ((*path, name) for path, section in level for name in section.model_fields)
        level = [
            ((*path, name), inner)
            for path, section in level
            for name, field in section.model_fields.items()
            for inner in _sections(field.annotation)
        ]


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type is made of: of `Schedule | None` or `list[Resolution]` the inner one."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Section) else []
    if typing.get_origin(annotation) in (dict, Mapping):
        return []
    return [inner for argument in typing.get_args(annotation) for inner in _sections(argument)]
