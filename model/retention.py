"""The removal, by a worker, of those of its own attempt's checkpoints, or of their parts, that retention does not keep.

Checkpoints of attempts that have ended are the controller's to remove (`orchestrator.retention`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import partial

import msgspec

from model import contract, storage
from model.config import Checkpoints
from model.contract import Attempt, Manifest, kept


def prune(attempt: Attempt, settings: Checkpoints, sealed: Mapping[int, Manifest]) -> dict[int, Manifest]:
    """Remove what retention does not keep (`model.kept`) of `sealed`, all that this attempt sealed; rank 0 alone calls
    it, once the newest of them is sealed.

    A manifest goes before its files, and a file that a kept manifest refers to stays. Returns what is still to be
    looked at next time: kept checkpoints, with the parts that they still have, and removed ones of which such a file
    is left.

    A worker whose attempt is closed removes nothing: its successor may be reading. If it is closed just after we
    looked, no harm is done: what is removed here has newer ones, sealed before we looked, and the controller counts
    what is sealed only after it has closed the attempt, so it has found those.
    """
    if storage.exists(f"{attempt.run_dir}/{contract.closed_file(attempt.attempt)}"):
        return dict(sealed)
    stay, left = _stay(attempt, settings, sealed), dict(sealed)
    for step, parts in stay.items():
        left[step] = _drop(attempt, step, parts, {one: left[one] for one in stay})
    needed = _files(attempt, [left[step] for step in stay])
    for step in sorted(sealed.keys() - stay.keys()):
        manifest = f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}"
        but = {path for path in needed if os.path.dirname(path) == os.path.dirname(manifest)}
        gone = storage.remove_folder_of(manifest, but, partial(_is_pinned, attempt, step))
        if gone and not but:
            del left[step]
    return left


def _stay(attempt: Attempt, settings: Checkpoints, sealed: Mapping[int, Manifest]) -> dict[int, kept.Parts]:
    named = {step: frozenset(parts) for step, parts in attempt.keep_parts.items()}
    reasons = kept.why(
        [(attempt.attempt, step) for step in sealed],
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        keep_steps={step: named.get(step) for step in attempt.keep_steps},
        pinned=_pins(attempt),
    )
    return {step: stays.parts for (_, step), stays in reasons.items()}


def _drop(attempt: Attempt, step: int, parts: kept.Parts, stay: Mapping[int, Manifest]) -> Manifest:
    """Leave these parts of a checkpoint; returns its manifest with what it then has."""
    manifest = stay[step]
    going = set() if parts is None else manifest.parts.keys() - parts
    if not going:
        return manifest
    left = msgspec.structs.replace(manifest, parts={p: f for p, f in manifest.parts.items() if p not in going})
    needed = _files(attempt, [left, *(other for at, other in stay.items() if at != step)])
    folder = f"{attempt.run_dir}/{contract.checkpoint_dir(attempt.phase, attempt.attempt, step)}"
    own = {path for path in _files(attempt, [manifest]) - needed if os.path.dirname(path) == folder}
    notes = [contract.dropped_file(attempt.phase, attempt.attempt, step, part) for part in sorted(going)]
    gone = storage.remove_behind(
        [f"{attempt.run_dir}/{note}" for note in notes], sorted(own), partial(_is_pinned, attempt, step, going)
    )
    return left if gone else manifest


def _files(attempt: Attempt, manifests: Collection[Manifest]) -> set[str]:
    return {f"{attempt.run_dir}/{file.path}" for one in manifests for files in one.parts.values() for file in files}


def _is_pinned(attempt: Attempt, step: int, parts: Collection[str] | None = None) -> bool:
    return kept.wanted(_pins(attempt), (attempt.attempt, step), parts)


def _pins(attempt: Attempt) -> dict[kept.Sealed, kept.Parts]:
    return kept.pinned(storage.read_there(f"{attempt.run_dir}/{contract.PINS_DIR}"), attempt.phase)
