"""Which checkpoints of a phase stay, and which parts of each: one rule for the worker, which removes its own, for the
controller, which removes those of ended attempts, and for the plan. Pure, and part of `model.contract`, through which
everybody comes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import msgspec

Sealed = tuple[int, int]
"""A checkpoint of a phase: attempt and step."""

Parts = frozenset[str] | None
"""Parts of a checkpoint; None: all that it has."""


class Stays(NamedTuple):
    """Why a checkpoint stays, and what of it. Only one of which all stays can be gone on from."""

    why: tuple[str, ...]
    parts: Parts


def why(
    sealed: Collection[Sealed],
    *,
    keep_last: int,
    keep_every: int | None,
    keep_steps: Mapping[int, Parts],
    bad: Collection[Sealed] = (),
    pinned: Mapping[Sealed, Parts] | None = None,
) -> dict[Sealed, Stays]:
    """The checkpoints that stay, newest first, each with its reasons; what is not in it may go.

    Kept are the newest until `keep_last` whole ones are among them and whole ones at multiples of `keep_every`, these
    with all parts; and of those at `keep_steps` (something refers to them) and of pinned ones the parts that are named.
    Of several attempts that sealed a step only one counts, see `counting`. `bad`: those that were marked; one that
    something refers to stays, as somebody may repair it.
    """
    reasons: dict[Sealed, dict[str, Parts]] = {one: {} for one in sorted(sealed, key=_age, reverse=True)}
    whole = 0
    for one in counting(sealed, bad):
        step, is_whole = one[1], one not in bad
        if whole < keep_last:
            reasons[one]["newest"] = None
        whole += is_whole
        if keep_every is not None and step % keep_every == 0 and is_whole:
            reasons[one][f"every {keep_every}"] = None
        if step in keep_steps:
            reasons[one]["referred to"] = keep_steps[step]
    for one, parts in (pinned or {}).items():
        if one in reasons:
            reasons[one]["pinned"] = parts
    return {one: Stays(tuple(given), together(given.values())) for one, given in reasons.items() if given}


def together(several: Iterable[Parts]) -> Parts:
    """What any of them names."""
    found: frozenset[str] = frozenset()
    for parts in several:
        if parts is None:
            return None
        found |= parts
    return found


def counting(sealed: Collection[Sealed], bad: Collection[Sealed] = ()) -> list[Sealed]:
    """One checkpoint for each step, newest first: the newest attempt's whole one or, if all are bad, the newest's."""
    of_step: dict[int, Sealed] = {}
    for one in sorted(sealed, key=lambda one: (one not in bad, one[0])):
        of_step[one[1]] = one
    return sorted(of_step.values(), key=_age, reverse=True)


def _age(one: Sealed) -> tuple[int, int]:
    attempt, step = one
    return step, attempt


# --- what lies in the run that decides --------------------------------------------------------------------------------


def named(names: Iterable[str], phase: str) -> set[Sealed]:
    """The checkpoints of `phase` that files such as `<phase>-<attempt>-<step>.json` or `...-<step>-<by>.json` name:
    pins and marks."""
    pattern = re.compile(re.escape(phase) + r"-(\d+)-(\d+)(?:-.+)?\.json")
    return {(int(found[1]), int(found[2])) for name in names if (found := pattern.fullmatch(name))}


class _Pin(msgspec.Struct):
    """What of a pin counts here."""

    parts: frozenset[str]


def pinned(pins: Mapping[str, bytes], phase: str) -> dict[Sealed, Parts]:
    """The checkpoints of `phase` that are pinned, and the parts that the pins name. pins: files by path. One that
    names no parts, or cannot be read, keeps all of them."""
    found: dict[Sealed, list[Parts]] = {}
    for path, data in pins.items():
        for one in named([path.rpartition("/")[2]], phase):
            found.setdefault(one, []).append(_parts_of(data))
    return {one: together(several) for one, several in found.items()}


def wanted(pinned: Mapping[Sealed, Parts], one: Sealed, parts: Collection[str] | None = None) -> bool:
    """Whether a checkpoint is pinned, with any of these parts if some are named."""
    if one not in pinned:
        return False
    named = pinned[one]
    return parts is None or named is None or not named.isdisjoint(parts)


def _parts_of(pin: bytes) -> Parts:
    try:
        return msgspec.json.decode(pin, type=_Pin).parts
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


DROPPED = ".dropped"
"""The end of the name of the note, `<part>.dropped` beside the manifest, that says that a part of a checkpoint is gone
or about to go, on purpose. It is there before the part's files go and as long as the manifest is."""


def dropped(names: Iterable[str]) -> set[str]:
    """The parts that are gone of the checkpoint in whose folder these names are."""
    return {name.removesuffix(DROPPED) for name in names if name.endswith(DROPPED)}
