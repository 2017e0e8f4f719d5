"""Which of its own checkpoints an attempt keeps, and the removal of the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from model import contract, storage
from model.config import Checkpoints
from model.contract import Attempt, Manifest


def prune(attempt: Attempt, settings: Checkpoints, sealed: Mapping[int, Manifest]) -> dict[int, Manifest]:
    """Remove what retention does not keep of `sealed`, all that this attempt sealed; rank 0 alone calls it.

    Kept are the newest `keep_last`, the multiples of `keep_every`, the attempt's `keep_steps` and what the folder
    `pins/` names. A manifest goes before its files, and a file that a kept manifest refers to stays. Returns what is
    still to be looked at next time: kept checkpoints, and removed ones of which such a file is left.
    """
    kept = _kept(attempt, settings, sealed)
    needed = {path for step in kept for path in _paths(sealed[step])}
    left = dict(sealed)
    for step in sorted(sealed.keys() - kept):
        folder = contract.checkpoint_dir(attempt.phase, attempt.attempt, step)
        storage.remove(f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}")
        own = {
            file.path for files in sealed[step].parts.values() for file in files if file.path.startswith(f"{folder}/")
        }
        for path in sorted(own - needed):
            storage.remove(f"{attempt.run_dir}/{path}")
        if not own & needed:
            storage.remove_tree(f"{attempt.run_dir}/{folder}")
            del left[step]
    return left


def _paths(manifest: Manifest) -> set[str]:
    return {file.path for files in manifest.parts.values() for file in files}


def _kept(attempt: Attempt, settings: Checkpoints, sealed: Collection[int]) -> set[int]:
    pins = storage.names(f"{attempt.run_dir}/{contract.PINS_DIR}")
    newest = sorted(sealed)[-settings.keep_last :]
    return {
        step
        for step in sealed
        if step in newest
        or step in attempt.keep_steps
        or (settings.keep_every is not None and step % settings.keep_every == 0)
        or any(_pins(attempt, step, pin) for pin in pins)
    }


def _pins(attempt: Attempt, step: int, pin: str) -> bool:
    """Whether the file `<phase>-<attempt>-<step>[-nonce].json` pins that step of this attempt."""
    stem = f"{attempt.phase}-{attempt.attempt}-{step}"
    return pin == f"{stem}.json" or (pin.startswith(f"{stem}-") and pin.endswith(".json"))
