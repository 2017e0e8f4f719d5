"""What kinds of images rule out: networks of other channels, and augmentations that need RGB. Part of
`orchestrator.checks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model.config import RGB, Data, SslPhase
from orchestrator.draft import Draft
from orchestrator.handoff import SSL_KINDS
from orchestrator.problems import Path, Problem, listed

NEED_RGB = ("saturation", "hue", "grayscale")
OF_JITTER = ("saturation", "hue")


def all_problems(draft: Draft) -> Iterator[Problem]:
    yield from channels(draft)
    yield from normalised(draft)
    yield from augmentations(draft)


def channels(draft: Draft) -> Iterator[Problem]:
    """Images that have other channels than the network looks at."""
    if draft.model is None:
        return
    wanted = draft.model.backbone.channels
    for at, data in _sections(draft):
        if data.channels != wanted:
            yield Problem("the network is made for other images", (*at, "channels"),
                          found=f"data.channels {data.channels}, model.backbone.channels {wanted}",
                          allowed="the same number", hint=f"model.backbone.channels={data.channels}")  # fmt: skip


def _sections(draft: Draft) -> Iterator[tuple[Path, Data]]:
    for name, phase in draft.phases.items():
        yield ("phases", name, "data"), phase.data
    if draft.evaluate is not None:
        yield ("evaluate", "data"), draft.evaluate.data


def normalised(draft: Draft) -> Iterator[Problem]:
    """An evaluation that shows the backbone images on another scale than it was trained on."""
    trained = [name for name, settings in draft.raw.items() if str(settings.get("kind")) in SSL_KINDS]
    if draft.evaluate is None or not trained or (phase := draft.phases.get(trained[-1])) is None:
        return
    seen, own = draft.evaluate.data, phase.data
    for key in ("bits", "mean", "std"):
        if getattr(seen, key) != getattr(own, key):
            yield Problem(f"the evaluation's is not that of phase {trained[-1]}, whose backbone it scores",
                          ("evaluate", "data", key), found=_numbers(getattr(seen, key)),
                          allowed=f"{_numbers(getattr(own, key))} (phases.{trained[-1]}.data.{key})")  # fmt: skip


def _numbers(value: Any) -> str:
    return f"[{listed([f'{one:g}' for one in value])}]" if isinstance(value, tuple) else str(value)


def augmentations(draft: Draft) -> Iterator[Problem]:
    """What cannot be done to images without colours."""
    for name, phase in draft.phases.items():
        if not isinstance(phase, SslPhase):
            continue
        at, augment = ("phases", name, "augment"), phase.augment
        asked = [key for key in NEED_RGB if getattr(augment, key) and (augment.jitter or key not in OF_JITTER)]
        if phase.data.channels != RGB and asked:
            yield Problem(f"needs RGB, and images have {phase.data.channels} channels (data.channels)", at,
                          found=listed([f"augment.{key} {getattr(augment, key):g}" for key in asked]),
                          hint=f"augment: {{{', '.join(f'{key}: 0.0' for key in asked)}}}")  # fmt: skip
