"""The removal, by a worker, of those of its own attempt's checkpoints that retention does not keep.

Checkpoints of attempts that have ended are the controller's to remove (`orchestrator.retention`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from model import contract, storage
from model.config import Checkpoints
from model.contract import Attempt, Manifest, kept


def prune(attempt: Attempt, settings: Checkpoints, sealed: Mapping[int, Manifest]) -> dict[int, Manifest]:
    """Remove what retention does not keep (`model.kept`) of `sealed`, all that this attempt sealed; rank 0 alone calls
    it, once the newest of them is sealed.

    A manifest goes before its files, and a file that a kept manifest refers to stays. Returns what is still to be
    looked at next time: kept checkpoints, and removed ones of which such a file is left.

    A worker whose attempt is closed removes nothing: its successor may be reading. If it is closed just after we
    looked, no harm is done: what is removed here has newer ones, sealed before we looked, and the controller counts
    what is sealed only after it has closed the attempt, so it has found those.
    """
    if storage.exists(f"{attempt.run_dir}/{contract.closed_file(attempt.attempt)}"):
        return dict(sealed)
    stay = _stay(attempt, settings, sealed)
    needed = {
        f"{attempt.run_dir}/{file.path}" for step in stay for files in sealed[step].parts.values() for file in files
    }
    left = dict(sealed)
    for step in sorted(sealed.keys() - stay):
        manifest = f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}"
        but = {path for path in needed if os.path.dirname(path) == os.path.dirname(manifest)}
        gone = storage.remove_folder_of(manifest, but, partial(_is_pinned, attempt, step))
        if gone and not but:
            del left[step]
    return left


def _stay(attempt: Attempt, settings: Checkpoints, sealed: Mapping[int, Manifest]) -> set[int]:
    reasons = kept.why(
        [(attempt.attempt, step) for step in sealed],
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        keep_steps=attempt.keep_steps,
        pinned=_pins(attempt),
    )
    return {step for _, step in reasons}


def _is_pinned(attempt: Attempt, step: int) -> bool:
    return (attempt.attempt, step) in _pins(attempt)


def _pins(attempt: Attempt) -> set[kept.Sealed]:
    return kept.named(storage.names(f"{attempt.run_dir}/{contract.PINS_DIR}"), attempt.phase)
