"""Widths that `precision.fp8: blocks` cannot multiply, which no released architecture has. Part of
`orchestrator.checks`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.accounting import ffn_width
from model.config import FP8_MULTIPLE, Backbone, TextPhase
from orchestrator.draft import Draft
from orchestrator.problems import Path, Problem, listed

NONE = "or precision.fp8: none"


def all_problems(draft: Draft) -> Iterator[Problem]:
    """Each width once, whatever number of phases multiply it."""
    names = [name for name, phase in draft.phases.items() if phase.precision.fp8 == "blocks"]
    if names and draft.model is not None:
        backbone, who = draft.model.backbone, f"phase{'s' if len(names) > 1 else ''} {listed(names)}"
        hint = None if backbone.ffn == "mlp" else _align(backbone)
        yield from _block(("model", "backbone"), backbone.dim, backbone.ffn_ratio, _hidden(backbone), who, hint)
    for name in names:
        if isinstance(phase := draft.phases[name], TextPhase):
            tower = phase.text
            hidden = ffn_width(tower.dim, "mlp", tower.ffn_ratio, 1)
            yield from _block(("phases", name, "text"), tower.dim, tower.ffn_ratio, hidden, f"phase {name}", None)


def _hidden(backbone: Backbone) -> int:
    return ffn_width(backbone.dim, backbone.ffn, backbone.ffn_ratio, backbone.ffn_align)


def _align(backbone: Backbone) -> str:
    return f"model.backbone.ffn_align: {math.lcm(backbone.ffn_align, FP8_MULTIPLE)}"


def _block(at: Path, dim: int, ratio: float, hidden: int, who: str, hint: str | None) -> Iterator[Problem]:
    """Of one kind of blocks, at `at`. The hidden width follows from `dim`, so it is looked at where that fits."""
    what = f"precision.fp8 of {who} cannot multiply matrices this wide"
    if dim % FP8_MULTIPLE:
        near = " or ".join(str(width) for width in _near(dim))
        yield Problem(what, (*at, "dim"), found=str(dim), allowed=f"multiples of {FP8_MULTIPLE}",
                      hint=f"nearest: {near}; {NONE}")  # fmt: skip
    elif hidden % FP8_MULTIPLE:
        near = " or ".join(f"{math.ceil(width / dim * 10_000) / 10_000:g}" for width in _near(hidden))
        yield Problem(what, (*at, "ffn_ratio"), found=f"{ratio:g}, which is a hidden width of {hidden}",
                      allowed=f"hidden widths that are multiples of {FP8_MULTIPLE}",
                      hint=f"{hint or f'nearest: {near}'}; {NONE}")  # fmt: skip


def _near(width: int) -> list[int]:
    below = width // FP8_MULTIPLE * FP8_MULTIPLE
    return [near for near in (below, below + FP8_MULTIPLE) if near]
