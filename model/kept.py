"""Which checkpoints of a phase stay: one rule for the worker, which removes its own, for the controller, which removes
those of ended attempts, and for the plan. Pure, and part of `model.contract`, through which everybody comes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

Sealed = tuple[int, int]
"""A checkpoint of a phase: attempt and step."""


def why(
    sealed: Collection[Sealed],
    *,
    keep_last: int,
    keep_every: int | None,
    keep_steps: Collection[int],
    bad: Collection[Sealed] = (),
    pinned: Collection[Sealed] = (),
) -> dict[Sealed, tuple[str, ...]]:
    """The checkpoints that stay, newest first, each with its reasons; what is not in it may go.

    Kept are the newest until `keep_last` whole ones are among them, whole ones at multiples of `keep_every`, those at
    `keep_steps` (something refers to them), and what is pinned. Of several attempts that sealed a step only one counts,
    see `counting`. `bad`: those that were marked; one that something refers to stays, as somebody may repair it.
    """
    reasons: dict[Sealed, list[str]] = {one: [] for one in sorted(sealed, key=_age, reverse=True)}
    whole = 0
    for one in counting(sealed, bad):
        step, is_whole = one[1], one not in bad
        if whole < keep_last:
            reasons[one].append("newest")
        whole += is_whole
        if keep_every is not None and step % keep_every == 0 and is_whole:
            reasons[one].append(f"every {keep_every}")
        if step in keep_steps:
            reasons[one].append("referred to")
    for one in reasons.keys() & set(pinned):
        reasons[one].append("pinned")
    return {one: tuple(why) for one, why in reasons.items() if why}


def counting(sealed: Collection[Sealed], bad: Collection[Sealed] = ()) -> list[Sealed]:
    """One checkpoint for each step, newest first: the newest attempt's whole one or, if all are bad, the newest's."""
    of_step: dict[int, Sealed] = {}
    for one in sorted(sealed, key=lambda one: (one not in bad, one[0])):
        of_step[one[1]] = one
    return sorted(of_step.values(), key=_age, reverse=True)


def _age(one: Sealed) -> tuple[int, int]:
    attempt, step = one
    return step, attempt


def named(names: Iterable[str], phase: str) -> set[Sealed]:
    """The checkpoints of `phase` that files such as `<phase>-<attempt>-<step>.json` or `...-<step>-<by>.json` name:
    pins and marks."""
    pattern = re.compile(re.escape(phase) + r"-(\d+)-(\d+)(?:-.+)?\.json")
    return {(int(found[1]), int(found[2])) for name in names if (found := pattern.fullmatch(name))}
