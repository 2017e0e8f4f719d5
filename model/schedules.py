"""Values that move with the step: closed forms, so that resuming needs nothing but the step.

Form v2, DINOv3's second: linear or half-cosine from `start`, reaching `peak` at step `warmup_steps`, then half-cosine
or linear, reaching `end` at the phase's last step. Form v1 is that of DINO and DINOv2.
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
    if schedule.form == "v1":
        return _v1(schedule, step, steps)
    peak, warmup = schedule.peak, schedule.warmup_steps
    if step < warmup:
        start = peak if schedule.start is None else schedule.start
        return _between(start, peak, step / warmup, schedule.warmup)
    end = peak if schedule.end is None else schedule.end
    after = min(step, steps - 1) - warmup
    return _between(peak, end, max(after, 0) / max(steps - 1 - warmup, 1), schedule.decay)


def _v1(schedule: config.Schedule, step: int, steps: int) -> float:
    """linspace(start, peak, warm-up), its last being `peak`; then a decay over the n steps left, at 0, 1/n .. (n-1)/n
    of its way (DINO's `cosine_scheduler`; its teacher temperature moves once an epoch: `hold_steps`)."""
    hold = schedule.hold_steps
    step, steps, warmup = step // hold, -(-steps // hold), -(-schedule.warmup_steps // hold)
    if step < warmup:
        start = schedule.peak if schedule.start is None else schedule.start
        return _between(start, schedule.peak, step / max(warmup - 1, 1), schedule.warmup)
    end = schedule.peak if schedule.end is None else schedule.end
    return _between(schedule.peak, end, (min(step, steps - 1) - warmup) / max(steps - warmup, 1), schedule.decay)


def _between(first: float, last: float, share: float, shape: str) -> float:
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    # Written so that both ends are exact, and a constant schedule is constant to the bit.
    return first if first == last else (1 - share) * first + share * last


def learning_rate(optim: config.Optim, step: int, steps: int) -> float:
    """The learning rate of that update, scaled by the batch size: in form v2 the whole schedule, in v1 its peak alone
    (DINO and DINOv2 do not scale `min_lr`)."""
    scale = lr_scale(optim.lr_scaling, optim.batch_size)
    if optim.lr.form == "v2":
        return value(optim.lr, step, steps) * scale
    end = optim.lr.peak * scale if optim.lr.end is None else optim.lr.end
    return value(optim.lr.model_copy(update={"peak": optim.lr.peak * scale, "end": end}), step, steps)


def lr_scale(scaling: str, batch_size: int) -> float:
    """`sqrt_wrt_1024`: 4 * sqrt(batch / 1024), as DINOv3's; `linear_256`: batch / 256, as DINO's."""
    if scaling == "linear_256":
        return batch_size / 256
    return 4 * math.sqrt(batch_size / 1024) if scaling == "sqrt_wrt_1024" else 1.0
