"""Values that move with the step: closed forms, so that resuming needs nothing but the step.

DINOv3's second form of schedule: linear or half-cosine from `start`, reaching `peak` at step `warmup_steps`, then
half-cosine or linear, reaching `end` at the phase's last step.
"""

from __future__ import annotations

import math

from model import config


def value(schedule: config.Schedule, step: int, steps: int) -> float:
    """The value for the update after `step` updates, 0 <= step < `steps`, the phase's length; past it, the last one.

    A phase with a single step after its warm-up makes it at `peak`. Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"a schedule begins at step 0, got {step}")
    peak, warmup = schedule.peak, schedule.warmup_steps
    if step < warmup:
        start = peak if schedule.start is None else schedule.start
        return _between(start, peak, step / warmup, schedule.warmup)
    end = peak if schedule.end is None else schedule.end
    after = min(step, steps - 1) - warmup
    return _between(peak, end, max(after, 0) / max(steps - 1 - warmup, 1), schedule.decay)


def _between(first: float, last: float, share: float, shape: str) -> float:
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    # Written so that both ends are exact, and a constant schedule is constant to the bit.
    return first if first == last else (1 - share) * first + share * last


def lr_scale(scaling: str, batch_size: int) -> float:
    """What the whole learning-rate schedule is multiplied by. `sqrt_wrt_1024`: 4 * sqrt(batch / 1024), as DINOv3's."""
    return 4 * math.sqrt(batch_size / 1024) if scaling == "sqrt_wrt_1024" else 1.0
