"""When to save: at which steps, and, with `checkpoints.every: auto`, how many steps apart. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import Checkpoints

FIRST = 10
"""With `auto`, the step of the first save; the next come at twice the step of the one before, until two are measured:
the first of an attempt also pays for the memory that it stages in."""

APART = 1.5
"""With `auto`, saves begin at least so many times as far apart as one takes, or the next falls due during it."""

SURE = 1.25
"""A save is taken to fit into what is left of the notice if so many times its expected duration does."""


def is_due(settings: Checkpoints, step: int, chosen: int | None, wanted: bool) -> bool:
    """Whether a save falls due at `step`. chosen: what `auto` has settled on; wanted: this very step is, by another
    phase or `keep_every`."""
    if settings.every != "auto":
        return step % settings.every == 0
    if chosen is None:
        doublings, rest = divmod(step, FIRST)
        return wanted or (rest == 0 and doublings.bit_count() == 1)
    return wanted or step % chosen == 0


@dataclass(frozen=True)
class Measured:
    """What saves of this attempt take, in seconds, and steps."""

    stall: float  # training stands still
    save: float  # from its beginning to the manifest
    step: float


def daly(cost: float, mtbf: float) -> float:
    """Seconds between two saves that lose the least time, where one costs `cost` seconds of training and failures come
    every `mtbf` seconds on average: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, Future Generation Computer Systems 22 (2006), equation 37. Young's square root is its first term."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def choose(measured: Measured, node_mtbf_hours: float, nodes: int) -> tuple[int, str]:
    """How many steps apart to save, and why, for a person."""
    mtbf = node_mtbf_hours * 3600 / nodes
    best, least = daly(measured.stall, mtbf), APART * measured.save
    steps = max(1, math.ceil(max(best, least) / measured.step))
    why = (
        f"a save every {steps} steps, {steps * measured.step:,.0f} s: Daly's interval is {best:,.0f} s where a save "
        f"holds training up for {measured.stall:.3g} s and a failure comes every {mtbf / 3600:,.4g} h "
        f"({node_mtbf_hours:,g} h a node, {nodes} of them)"
    )
    if least > best:
        why += f"; a save takes {measured.save:,.3g} s, so they begin at least {least:,.3g} s apart"
    return steps, why


def gives_up(rest: float, whole: float, left: float) -> bool:
    """Whether the save under way should make way for the last one. All in seconds: `rest` is what it still takes, and
    `whole` what the last one will; `left` is until the kill.

    Where both fit, nothing is lost by waiting. Where only the last one does, it loses fewer steps. Where neither does,
    the one under way is nearer to its end.
    """
    return SURE * whole <= left < SURE * (rest + whole)
