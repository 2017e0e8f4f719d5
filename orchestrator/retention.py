"""What is kept of a run's checkpoints and what may go, over all attempts; the removal of those of ended attempts.

The worker of a live attempt removes what it sealed itself (`model.retention`), by the same rule (`model.kept`); nobody
else touches that attempt's folders. Of the others only the controller removes, and three things make that safe while an
attempt of the run, or another run, is reading:

- What an attempt is told to read are checkpoints that this rule keeps (`resume_points`, and what phases refer to). So
  whoever removes by an older state of the log removes nothing that an attempt launched since is reading: later events
  only add newer checkpoints.
- What the live attempt was told stays, whatever the rule says now: a spec may be amended meanwhile.
- Another run pins before it looks, and a manifest that is being removed is put back if there is a pin by then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from model import storage
from model.contract import (
    BAD_DIR,
    EVALUATE,
    PINS_DIR,
    Bad,
    CheckpointRef,
    ContractError,
    Manifest,
    Record,
    attempt_yaml,
    bad_file,
    checkpoint_dir,
    decode,
    kept,
    manifest_file,
    read_attempt,
)
from orchestrator import handoff
from orchestrator.handoff import BadCheckpointError
from orchestrator.state import State

log = logging.getLogger(__name__)

FALLBACKS = 3
"""Checkpoints that an attempt is given to go on from: the newest, and older ones in case it cannot be read."""


class Pin(Record, frozen=True, omit_defaults=True):
    """Why the checkpoint that the pin's name says stays: another run takes parts of it, or a person wants it."""

    run: str  # the taker's directory; "" for a person's
    run_id: str
    parts: tuple[str, ...]
    by: str = ""  # the person
    why: str = ""


# --- what is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Of one phase. `counted`: what the log says is sealed; `reasons`: why what stays does, newest first."""

    phase: str
    counted: frozenset[kept.Sealed]
    reasons: Mapping[kept.Sealed, tuple[str, ...]]
    bad: frozenset[kept.Sealed]


def look(run_dir: str, state: State, phase: str, more: frozenset[kept.Sealed] = frozenset()) -> Kept:
    """more: checkpoints that a live attempt has sealed, which the log does not tell of yet."""
    cadence = state.settings(phase)["checkpoints"]
    counted = frozenset(state.accepted().get(phase, [])) | more
    bad = kept.named(storage.names(f"{run_dir}/{BAD_DIR}"), phase)
    reasons = kept.why(
        counted,
        keep_last=cadence["keep_last"],
        keep_every=cadence.get("keep_every"),
        keep_steps=handoff.keep_steps(state.spec, phase),
        bad=bad,
        pinned=pins(run_dir, phase),
    )
    return Kept(phase, counted, reasons, frozenset(bad))


def pins(run_dir: str, phase: str) -> set[kept.Sealed]:
    return kept.named(storage.names(f"{run_dir}/{PINS_DIR}"), phase)


def is_bad(ref: CheckpointRef) -> bool:
    """Whether the checkpoint is marked as one that cannot be read."""
    return storage.exists(f"{ref.run}/{bad_file(ref.phase, ref.attempt, ref.step)}")


def why_bad(ref: CheckpointRef) -> str:
    """What the mark of a bad checkpoint says."""
    path = f"{ref.run}/{bad_file(ref.phase, ref.attempt, ref.step)}"
    mark = decode(storage.read(path), Bad, path)
    return f"{mark.why} (found by {mark.by})"


def resume_points(run_dir: str, state: State, phase: str) -> list[CheckpointRef]:
    """What the next attempt of `phase` goes on from: the newest checkpoint that is kept and not marked as bad, and its
    fallbacks; empty means step 0. One that should be there and is not is among them: the trainer says so and marks it.

    Raises BadCheckpointError if there were some and all of them are bad: a phase never begins again in silence.
    """
    stay = look(run_dir, state, phase)
    known = state.resume_points(phase, run_dir)
    whole = stay.reasons.keys() - stay.bad
    usable = [ref for ref in known if ((ref.attempt, ref.step) in whole if ref.run == run_dir else not is_bad(ref))]
    if known and not usable:
        whys = "; ".join(f"{ref}: {why_bad(ref)}" for ref in known[:FALLBACKS] if is_bad(ref))
        raise BadCheckpointError(f"no checkpoint of {phase} to go on from is whole: {whys}")
    return usable[:FALLBACKS]


# --- removing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doomed:
    """A folder that may go, but for the files `but` that a manifest which stays refers to."""

    ref: CheckpointRef
    why: str
    but: frozenset[str]
    bytes: int  # of what goes; 0 where nobody has counted them


def doomed(run_dir: str, state: State, phase: str) -> list[Doomed]:
    """The folders of ended attempts of `phase` that may go: what retention does not keep, what was sealed after its
    attempt was closed, and what was never finished."""
    stay = look(run_dir, state, phase)
    spared = _read_by(run_dir, state) | {CheckpointRef(run_dir, phase, *one) for one in pins(run_dir, phase)}
    ended = [attempt.number for attempt in state.attempts if attempt.phase == phase and attempt.end]
    gone = [
        ref
        for ref in (
            CheckpointRef(run_dir, phase, number, step) for number in ended for step in steps(run_dir, phase, number)
        )
        if (ref.attempt, ref.step) not in stay.reasons and ref not in spared
    ]
    needed = _referred_to(run_dir, state, gone) if gone else set()
    found = []
    for ref in gone:
        but = frozenset(path for path in needed if path.startswith(f"{ref.path}/"))
        if len(storage.names(ref.path)) > len(but):  # else nothing but those files is left of it
            manifest = read_manifest(ref)
            files = [file for files in manifest.parts.values() for file in files] if manifest else []
            own = sum(f.bytes for f in files if f"{run_dir}/{f.path}" not in but and f.path.startswith(_folder(ref)))
            found.append(Doomed(ref, _why_gone(ref, manifest, stay), but, own))
    return found


def _folder(ref: CheckpointRef) -> str:
    return f"{checkpoint_dir(ref.phase, ref.attempt, ref.step)}/"


def _why_gone(ref: CheckpointRef, manifest: Manifest | None, stay: Kept) -> str:
    if manifest is None:
        return "never finished"
    if (ref.attempt, ref.step) not in stay.counted:
        return "sealed after its attempt was closed"
    return "marked as bad" if (ref.attempt, ref.step) in stay.bad else "not kept"


def steps(run_dir: str, phase: str, attempt: int) -> list[int]:
    """The steps of an attempt of which there is a folder, sealed or not, ascending."""
    folder = os.path.dirname(CheckpointRef(run_dir, phase, attempt, 0).path)
    return sorted(int(name) for name in storage.names(folder) if name.isdecimal())


def prune(run_dir: str, state: State, phase: str) -> list[Doomed]:
    """Remove them, each manifest before its files. Returns what is gone: what was pinned meanwhile is not."""
    return [
        one
        for one in doomed(run_dir, state, phase)
        if storage.remove_folder_of(
            f"{run_dir}/{manifest_file(phase, one.ref.attempt, one.ref.step)}", one.but, partial(_is_pinned, one.ref)
        )
    ]


def prune_ended(run_dir: str, state: State, phase: str) -> None:
    """As `prune`, once an attempt of `phase` has ended. What cannot be removed now can be at the next end, and the run
    goes on meanwhile."""
    if phase == EVALUATE:
        return
    try:
        prune(run_dir, state, phase)
    except storage.StoreError as error:
        log.warning("old checkpoints of %s were not removed, which is tried again later: %s", phase, error)


def _is_pinned(ref: CheckpointRef) -> bool:
    return (ref.attempt, ref.step) in pins(ref.run, ref.phase)


def _read_by(run_dir: str, state: State) -> set[CheckpointRef]:
    """What the live attempt was told to read, whole or in part."""
    if state.live is None:
        return set()
    path = f"{run_dir}/{attempt_yaml(state.live.number)}"
    told = read_attempt(storage.read(path), path)
    return {*told.resume, *told.inputs.values()}


def _referred_to(run_dir: str, state: State, gone: list[CheckpointRef]) -> set[str]:
    """The files that every manifest of the run which stays refers to, the live attempt's included: a frozen network is
    stored once, in the first checkpoint that had it."""
    there = [
        CheckpointRef(run_dir, attempt.phase, attempt.number, step)
        for attempt in state.attempts
        for step in steps(run_dir, attempt.phase, attempt.number)
    ]
    manifests = [manifest for ref in there if ref not in gone and (manifest := read_manifest(ref))]
    return {f"{run_dir}/{file.path}" for one in manifests for files in one.parts.values() for file in files}


def read_manifest(ref: CheckpointRef) -> Manifest | None:
    """None if there is none, or one that cannot be read: then its folder is no checkpoint."""
    path = f"{ref.run}/{manifest_file(ref.phase, ref.attempt, ref.step)}"
    try:
        return decode(storage.read(path), Manifest, path)
    except (FileNotFoundError, ContractError):
        return None
