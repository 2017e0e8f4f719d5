"""What lies in a run's checkpoints: the list of them, one in full, whether every byte is right, and copies of them.

Without torch, and through `model.storage` alone: the same for a folder and a bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import msgspec

from model import storage
from model.contract import (
    EVALUATE,
    PINS_DIR,
    Bad,
    CheckpointRef,
    File,
    Manifest,
    bad_file,
    decode,
    encode,
    kept,
    manifest_file,
    now,
    seal_manifest,
)
from orchestrator import handoff, retention
from orchestrator.perform import ControlError
from orchestrator.retention import Pin
from orchestrator.state import State

PIECE = 1 << 23
"""Bytes that are read at a time: files may be larger than memory."""

LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors format's own limit."""


# --- the list ---------------------------------------------------------------------------------------------------------


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint. `bytes`: of the files of the `parts` that are there, those included that it shares with others
    (`shared`)."""

    phase: str
    step: int
    attempt: int
    path: str
    bytes: int
    shared: int
    sealed_at: float
    parts: dict[str, int]  # bytes
    kept: list[str]  # why it stays; none: it may go
    may_go: dict[str, int]  # the parts that may go, and the bytes of them that it shares with no other
    bad: str  # why it was marked; "" if it was not
    counts: bool  # whether the log says so, or its attempt is live


def rows(run_dir: str, state: State) -> list[Row]:
    """Every sealed checkpoint that is there, by phase and step."""
    found = []
    for phase in state.spec["phases"]:
        numbers = [attempt.number for attempt in state.attempts if attempt.phase == phase]
        there = {(number, step) for number in numbers for step in retention.steps(run_dir, phase, number)}
        live = state.live.number if state.live else None
        stay = retention.look(run_dir, state, phase, frozenset(one for one in there if one[0] == live))
        for one in sorted(there, key=lambda one: (one[1], one[0])):
            ref = CheckpointRef(run_dir, phase, *one)
            if manifest := retention.read_manifest(ref):
                found.append(_row(ref, manifest, state, stay))
    return found


def _row(ref: CheckpointRef, manifest: Manifest, state: State, stay: retention.Kept) -> Row:
    one = (ref.attempt, ref.step)
    files = [file for files in manifest.parts.values() for file in files]
    why, parts = stay.reasons.get(one, ((), frozenset()))
    return Row(
        phase=ref.phase,
        step=ref.step,
        attempt=ref.attempt,
        path=ref.path,
        bytes=sum(file.bytes for file in files),
        shared=sum(file.bytes for file in files if not _is_own(ref, file)),
        sealed_at=manifest.sealed_at,
        parts={part: sum(file.bytes for file in files) for part, files in manifest.parts.items()},
        kept=[said for reason in why for said in _said(reason, ref, state)],
        may_go={
            part: sum(file.bytes for file in files if _is_own(ref, file))
            for part, files in manifest.parts.items()
            if parts is not None and part not in parts
        },
        bad=retention.why_bad(ref) if one in stay.bad else "",
        counts=one in stay.counted,
    )


def _is_own(ref: CheckpointRef, file: File) -> bool:
    return f"{ref.run}/{file.path}".startswith(f"{ref.path}/")


def _said(reason: str, ref: CheckpointRef, state: State) -> list[str]:
    """A reason of `model.kept`, with names."""
    if reason == "referred to":
        final = ["final"] if ref.step == state.spec["phases"][ref.phase]["steps"] else []
        return final + [f"{taker} takes it" for taker in _takers(ref, state)]
    if reason == "pinned":
        return [pin_said(pin) for pin in pins(ref).values()]
    return [reason]


def _takers(ref: CheckpointRef, state: State) -> Iterator[str]:
    for phase in (*state.spec["phases"], *([EVALUATE] if state.spec.get("evaluate") else [])):
        for name, reference in handoff.references(state.spec, phase).items():
            if reference.run is None and (reference.phase, handoff.step_of(state.spec, reference)) == (
                ref.phase,
                ref.step,
            ):
                yield f"{phase}.{name}"


def pins(ref: CheckpointRef) -> dict[str, Pin]:
    """The pins of a checkpoint, by path."""
    folder = f"{ref.run}/{PINS_DIR}"
    names = [name for name in storage.names(folder) if (ref.attempt, ref.step) in kept.named([name], ref.phase)]
    return {f"{folder}/{name}": decode(storage.read(f"{folder}/{name}"), Pin, f"{folder}/{name}") for name in names}


def pin_said(pin: Pin) -> str:
    """`pinned by ...`."""
    if pin.run:
        return f"pinned by run {pin.run}"
    return f"pinned by {pin.by}" + (f": {pin.why}" if pin.why else "")


# --- one in full ------------------------------------------------------------------------------------------------------


class Tensor(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]


class FileView(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a part. A part that was cut over processes has several, each with some rows of its tensors:
    `metadata` says which."""

    path: str
    bytes: int
    sha256: str
    metadata: dict[str, str]
    tensors: list[Tensor]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """`dropped`: parts that it had, and that nothing kept."""

    path: str
    manifest: Manifest
    parts: dict[str, list[FileView]]
    dropped: list[str]
    pins: list[str]
    bad: str


def view(ref: CheckpointRef) -> View:
    """One checkpoint, and what the headers of its files tell of their tensors. Raises ControlError for a torn one."""
    manifest = whole_manifest(ref)
    return View(
        path=ref.path,
        manifest=manifest,
        parts={part: [_file_view(ref, file) for file in files] for part, files in manifest.parts.items()},
        dropped=sorted(retention.dropped(ref)),
        pins=[pin_said(pin) for pin in pins(ref).values()],
        bad=retention.why_bad(ref) if retention.is_bad(ref) else "",
    )


def whole_manifest(ref: CheckpointRef) -> Manifest:
    manifest = retention.read_manifest(ref)
    if manifest is None:
        raise ControlError(f"{ref.path} has no manifest that can be read: it is no checkpoint any more")
    return manifest


def _file_view(ref: CheckpointRef, file: File) -> FileView:
    path = f"{ref.run}/{file.path}"
    try:
        length = min(int.from_bytes(storage.read(path, 0, 8), "little"), LONGEST_HEADER)
        header: dict[str, Any] = json.loads(storage.read(path, 8, length))
        metadata = header.pop("__metadata__", {})
        tensors = [Tensor(name, entry["dtype"], entry["shape"]) for name, entry in header.items()]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ControlError(f"{path}: {error}; `dinoctl ckpt verify` looks at all files") from error
    return FileView(path=file.path, bytes=file.bytes, sha256=file.sha256, metadata=metadata, tensors=tensors)


# --- every byte -------------------------------------------------------------------------------------------------------


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """`wrong`: a sentence for each file that is not what the manifest says; none: the checkpoint is whole."""

    ref: CheckpointRef
    bytes: int
    files: int
    wrong: list[str]
    was_marked: bool


def verify(run_dir: str, state: State) -> Iterator[Verified]:
    """Every checkpoint that the log counts and retention keeps, those of a live attempt included; a file that several
    share is read once."""
    known: dict[str, str] = {}
    for phase in state.spec["phases"]:
        for attempt, step in sorted(_to_verify(run_dir, state, phase), key=lambda one: (one[1], one[0])):
            if found := verify_one(CheckpointRef(run_dir, phase, attempt, step), known):
                yield found


def _to_verify(run_dir: str, state: State, phase: str) -> set[kept.Sealed]:
    """Also one that should be there and is not."""
    live = state.live
    own = retention.steps(run_dir, phase, live.number) if live and live.phase == phase else []
    sealed = {
        (live.number, s) for s in own if live and retention.read_manifest(CheckpointRef(run_dir, phase, live.number, s))
    }
    stay = retention.look(run_dir, state, phase, frozenset(sealed))
    there = {one for one in stay.counted if storage.exists(f"{run_dir}/{manifest_file(phase, *one)}")}
    return there | set(stay.reasons)


def verify_one(ref: CheckpointRef, known: dict[str, str] | None = None) -> Verified | None:
    """known: what was found of files that others share, by path. None: the checkpoint was removed meanwhile."""
    known = {} if known is None else known
    path = f"{ref.run}/{manifest_file(ref.phase, ref.attempt, ref.step)}"
    manifest, marked = retention.read_manifest(ref), retention.is_bad(ref)
    if manifest is None:
        says = "torn, altered, or of another version" if storage.exists(path) else "not there, though the log counts it"
        return Verified(ref=ref, bytes=0, files=0, wrong=[f"{path}: {says}"], was_marked=marked)
    files = [file for files in manifest.parts.values() for file in files]
    for file in files:
        where = f"{ref.run}/{file.path}"
        if where not in known:
            known[where] = _wrong(where, file)
    wrong = [known[f"{ref.run}/{file.path}"] for file in files if known[f"{ref.run}/{file.path}"]]
    if wrong and (again := retention.read_manifest(ref)) != manifest:  # it, or parts of it, went while we read it
        return verify_one(ref, known) if again else None
    return Verified(ref=ref, bytes=sum(f.bytes for f in files), files=len(files), wrong=wrong, was_marked=marked)


def _wrong(path: str, file: File) -> str:
    """What is wrong with a file; "" for nothing."""
    digest, size = hashlib.sha256(), 0
    try:
        for piece in pieces(path):
            digest.update(piece)
            size += len(piece)
    except FileNotFoundError:
        return f"{path} is not there, though the manifest names it"
    if size != file.bytes:
        return f"{path}: {size} bytes, and the manifest says {file.bytes}: the file is torn"
    if digest.hexdigest() != file.sha256:
        return f"{path}: sha256 {digest.hexdigest()}, and the manifest says {file.sha256}: the file was altered"
    return ""


def pieces(path: str) -> Iterator[bytes]:
    """A file, a piece at a time. Raises FileNotFoundError, StoreError."""
    start = 0
    while piece := storage.read(path, start, PIECE):
        yield piece
        start += len(piece)
        if len(piece) < PIECE:
            return


def mark(found: Verified, by: str) -> None:
    """Mark what is bad, lift the mark of what is whole."""
    path = f"{found.ref.run}/{bad_file(found.ref.phase, found.ref.attempt, found.ref.step)}"
    if not found.wrong:
        storage.remove(path)
        return
    with suppress(storage.AlreadyPublished):
        storage.publish(path, encode(Bad(why="; ".join(found.wrong), by=by, at=now())))


# --- copies -----------------------------------------------------------------------------------------------------------


def copy(ref: CheckpointRef, target: str, parts: Collection[str]) -> CheckpointRef:
    """Copy a checkpoint, or parts of it, to a folder or URI, every byte verified on the way, the manifest last.

    Its files keep their paths below `target`, so that a frozen network which others share lies where the manifest says.
    Raises ControlError for parts that it has not, for a damaged file, and if it is there already; StoreError. What was
    copied until then is removed.
    """
    manifest = whole_manifest(ref)
    if missing := set(parts) - manifest.parts.keys():
        there = ", ".join(manifest.parts)
        raise ControlError(f"{ref} has no {', '.join(sorted(missing))}; it has {there}")
    taken = {part: files for part, files in manifest.parts.items() if not parts or part in parts}
    made = msgspec.structs.replace(ref, run=target)
    path = f"{target}/{manifest_file(made.phase, made.attempt, made.step)}"
    if storage.exists(path):
        raise ControlError(f"{path} is there already")
    new: list[str] = []
    try:
        for file in (file for files in taken.values() for file in files):
            if not storage.exists(f"{target}/{file.path}"):
                new.append(f"{target}/{file.path}")
            _copy(f"{ref.run}/{file.path}", f"{target}/{file.path}", file)
        storage.publish(path, seal_manifest(msgspec.structs.replace(manifest, parts=taken)))
    except BaseException:
        for one in new:
            storage.remove(one)
        raise
    return made


def _copy(source: str, target: str, file: File) -> None:
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        try:
            for piece in pieces(source):
                digest.update(piece)
                yield piece
        except FileNotFoundError as error:
            raise ControlError(f"{source} is not there, though the manifest names it") from error
        if digest.hexdigest() != file.sha256:
            raise ControlError(f"{source} is not what its manifest says: torn or altered")

    try:
        storage.publish_pieces(target, hashed())
    except storage.AlreadyPublished as error:
        raise ControlError(f"{target} is there already, with other bytes; name another target") from error
