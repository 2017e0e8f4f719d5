"""What is kept of a run's checkpoints and what may go, over all attempts; the removal of those of ended attempts, and
of the parts of them that nothing keeps.

The worker of a live attempt removes what it sealed itself (`model.retention`), by the same rule (`model.kept`); nobody
else touches that attempt's folders. Of the others only the controller removes, and three things make that safe while an
attempt of the run, or another run, is reading:

- What an attempt is told to read are checkpoints that this rule keeps (`resume_points`, and what phases refer to). So
  whoever removes by an older state of the log removes nothing that an attempt launched since is reading: later events
  only add newer checkpoints.
- What the live attempt was told stays, whatever the rule says now: a spec may be amended meanwhile.
- Another run pins before it looks, and a manifest that is being removed is put back if there is a pin by then; so is
  the note taken back that says that a part is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import msgspec

from model import contract, storage
from model.contract import (
    BAD_DIR,
    EVALUATE,
    PARTS,
    PINS_DIR,
    Bad,
    CheckpointRef,
    ContractError,
    Manifest,
    Record,
    attempt_yaml,
    bad_file,
    decode,
    dropped_file,
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
    """Of one phase. `counted`: what the log says is sealed; `reasons`: why what stays does, and which parts, newest
    first."""

    phase: str
    counted: frozenset[kept.Sealed]
    reasons: Mapping[kept.Sealed, kept.Stays]
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
        keep_steps=handoff.keep_parts(state.spec, phase),
        bad=bad,
        pinned=pins(run_dir, phase),
    )
    return Kept(phase, counted, reasons, frozenset(bad))


def pins(run_dir: str, phase: str) -> dict[kept.Sealed, kept.Parts]:
    """What is pinned, by the parts that the pins keep."""
    return kept.pinned(storage.read_there(f"{run_dir}/{PINS_DIR}"), phase)


def dropped(ref: CheckpointRef) -> set[str]:
    """The parts of a checkpoint that were removed, as only others of it are kept."""
    return kept.dropped(storage.names(ref.path))


def is_bad(ref: CheckpointRef) -> bool:
    """Whether the checkpoint is marked as one that cannot be read."""
    return storage.exists(f"{ref.run}/{bad_file(ref.phase, ref.attempt, ref.step)}")


def why_bad(ref: CheckpointRef) -> str:
    """What the mark of a bad checkpoint says."""
    path = f"{ref.run}/{bad_file(ref.phase, ref.attempt, ref.step)}"
    mark = decode(storage.read(path), Bad, path)
    return f"{mark.why} (found by {mark.by})"


def resume_points(run_dir: str, state: State, phase: str) -> list[CheckpointRef]:
    """What the next attempt of `phase` goes on from: the newest checkpoint that is kept, with all its parts, and not
    marked as bad, and its fallbacks; empty means step 0. One that should be there and is not is among them: the trainer
    says so and marks it.

    Raises BadCheckpointError if there were some and all of them are bad: a phase never begins again in silence.
    """
    stay = look(run_dir, state, phase)
    known = state.resume_points(phase, run_dir)
    whole = {one for one, stays in stay.reasons.items() if _is_all(stays.parts)} - stay.bad
    good = (ref for ref in known if ((ref.attempt, ref.step) in whole if ref.run == run_dir else not is_bad(ref)))
    usable = list(islice((ref for ref in good if not dropped(ref)), FALLBACKS))
    if known and not usable:
        whys = "; ".join(f"{ref}: {why_bad(ref)}" for ref in known[:FALLBACKS] if is_bad(ref))
        raise BadCheckpointError(f"no checkpoint of {phase} to go on from is whole: {whys}")
    return usable


def _is_all(parts: kept.Parts) -> bool:
    return parts is None or parts.issuperset(PARTS)


# --- removing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doomed:
    """What may go of a checkpoint: its folder, but for the files `but` that a manifest which stays refers to; or, where
    it stays in part, those of its `parts` and `files`."""

    ref: CheckpointRef
    why: str
    bytes: int  # of what goes; 0 where nobody has counted them
    but: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        return f"{', '.join(self.parts)} of {self.ref}" if self.parts else str(self.ref)


def doomed(run_dir: str, state: State, phase: str) -> list[Doomed]:
    """What may go of ended attempts of `phase`: what retention does not keep, what was sealed after its attempt was
    closed, what was never finished; and of checkpoints that only stay in part the other parts."""
    stay = look(run_dir, state, phase)
    read = _read_by(run_dir, state)
    ended = [attempt.number for attempt in state.attempts if attempt.phase == phase and attempt.end]
    there = [CheckpointRef(run_dir, phase, number, step) for number in ended for step in steps(run_dir, phase, number)]
    idle = [ref for ref in there if ref not in read]
    spared = {*stay.reasons, *pins(run_dir, phase)}
    gone = [ref for ref in idle if (ref.attempt, ref.step) not in spared]
    thin = [(ref, stay.reasons[ref.attempt, ref.step].parts) for ref in idle if (ref.attempt, ref.step) in stay.reasons]
    thin = [(ref, parts) for ref, parts in thin if not _is_all(parts)]
    if not gone and not thin:
        return []
    named = _named_files(run_dir, state)
    of_those_that_stay = {ref: paths for ref, paths in named.items() if ref not in gone}
    found = [_gone(ref, stay, frozenset(_needed(of_those_that_stay, ref))) for ref in gone]
    found += [_thinner(ref, parts, _needed(named, ref)) for ref, parts in thin if parts is not None]
    return [one for one in found if one]


def _gone(ref: CheckpointRef, stay: Kept, but: frozenset[str]) -> Doomed | None:
    """A folder; None if nothing but files that others need is left of it."""
    if len(storage.names(ref.path)) <= len(but):
        return None
    manifest = read_manifest(ref)
    own = sum(size for path, size in _own_files(ref, manifest).items() if path not in but) if manifest else 0
    return Doomed(ref, _why_gone(ref, manifest, stay), own, but)


def _thinner(ref: CheckpointRef, parts: frozenset[str], needed: set[str]) -> Doomed | None:
    """The parts but these; what a removal that died left of parts that have gone is found too. None: nothing is."""
    manifest, names = read_manifest(ref), storage.names(ref.path)
    if manifest is None:
        return None
    going = tuple(part for part in manifest.parts if part not in parts)
    left = msgspec.structs.replace(manifest, parts={p: f for p, f in manifest.parts.items() if p in parts})
    stays = needed | _own_files(ref, left).keys() | {f"{ref.run}/{manifest_file(ref.phase, ref.attempt, ref.step)}"}
    files = [f"{ref.path}/{name}" for name in names if not name.endswith(kept.DROPPED)]
    files = [path for path in files if path not in stays]
    if not going and not files:
        return None
    own = _own_files(ref, manifest)
    return Doomed(ref, "only other parts are kept", sum(own.get(p, 0) for p in files), parts=going, files=tuple(files))


def _own_files(ref: CheckpointRef, manifest: Manifest) -> dict[str, int]:
    """The files in its folder that the manifest names, and their bytes."""
    files = [file for files in manifest.parts.values() for file in files]
    return {p: f.bytes for f in files if (p := f"{ref.run}/{f.path}").startswith(f"{ref.path}/")}


def _why_gone(ref: CheckpointRef, manifest: Manifest | None, stay: Kept) -> str:
    if manifest is None and (ref.attempt, ref.step) not in stay.bad:
        return "never finished"
    if (ref.attempt, ref.step) not in stay.counted:
        return "sealed after its attempt was closed"
    return "marked as bad" if (ref.attempt, ref.step) in stay.bad else "not kept"


def steps(run_dir: str, phase: str, attempt: int) -> list[int]:
    """The steps of an attempt of which there is a folder, sealed or not, ascending."""
    folder = os.path.dirname(CheckpointRef(run_dir, phase, attempt, 0).path)
    return sorted(int(name) for name in storage.names(folder) if name.isdecimal())


def prune(run_dir: str, state: State, phase: str) -> list[Doomed]:
    """Remove it: each manifest before its files, the note that a part is gone before that part's. Returns what is gone:
    what was pinned meanwhile is not."""
    return [one for one in doomed(run_dir, state, phase) if _remove(one)]


def _remove(one: Doomed) -> bool:
    ref = one.ref
    if one.files or one.parts:
        notes = [f"{ref.run}/{dropped_file(ref.phase, ref.attempt, ref.step, part)}" for part in one.parts]
        return storage.remove_behind(notes, one.files, partial(_is_pinned, ref, one.parts))
    manifest = f"{ref.run}/{manifest_file(ref.phase, ref.attempt, ref.step)}"
    return storage.remove_folder_of(manifest, one.but, partial(_is_pinned, ref))


def prune_ended(run_dir: str, state: State, phase: str) -> None:
    """As `prune`, once an attempt of `phase` has ended. What cannot be removed now can be at the next end, and the run
    goes on meanwhile."""
    if phase == EVALUATE:
        return
    try:
        prune(run_dir, state, phase)
    except storage.StoreError as error:
        log.warning("old checkpoints of %s were not removed, which is tried again later: %s", phase, error)


def _is_pinned(ref: CheckpointRef, parts: Collection[str] | None = None) -> bool:
    return kept.wanted(pins(ref.run, ref.phase), (ref.attempt, ref.step), parts)


def _read_by(run_dir: str, state: State) -> set[CheckpointRef]:
    """What the live attempt was told to read, whole or in part."""
    if state.live is None:
        return set()
    path = f"{run_dir}/{attempt_yaml(state.live.number)}"
    told = read_attempt(storage.read(path), path)
    return {*told.resume, *told.inputs.values()}


def _named_files(run_dir: str, state: State) -> dict[CheckpointRef, set[str]]:
    """The files that every manifest of the run refers to, the live attempt's included: a frozen network is stored once,
    in the first checkpoint that had it."""
    there = [
        CheckpointRef(run_dir, attempt.phase, attempt.number, step)
        for attempt in state.attempts
        for step in steps(run_dir, attempt.phase, attempt.number)
    ]
    manifests = {ref: manifest for ref in there if (manifest := read_manifest(ref))}
    return {
        ref: {f"{run_dir}/{file.path}" for files in one.parts.values() for file in files}
        for ref, one in manifests.items()
    }


def _needed(named: Mapping[CheckpointRef, set[str]], ref: CheckpointRef) -> set[str]:
    """The files in a checkpoint's folder that others name."""
    folder = f"{ref.path}/"
    return {path for other, paths in named.items() if other != ref for path in paths if path.startswith(folder)}


def read_manifest(ref: CheckpointRef) -> Manifest | None:
    """With the parts that are still there. None if there is none, or one that cannot be read: then its folder is no
    checkpoint."""
    path = f"{ref.run}/{manifest_file(ref.phase, ref.attempt, ref.step)}"
    try:
        return contract.read_manifest(storage.read(path), storage.names(ref.path), path)
    except (FileNotFoundError, ContractError):
        return None
