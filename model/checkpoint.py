"""Sealed checkpoints: parts as safetensors files, then the manifest that alone makes them a checkpoint.

The ranks write the parts, each file whole, exclusive and on disk before its size and sha256 are told; rank 0 publishes
`manifest.json` last. Whatever dies before that leaves a folder without a manifest, which is no checkpoint.
No pickle: tensors are safetensors, all else is JSON in the manifest.

A part that is cut over processes (`model.sharding`) is as many files as there are shards. Each says which rows of which
tensors it holds, so that any other number of processes can read just what it needs.

How a save ends is one key in the rendezvous store, its verdict, which whoever is first sets once for all: a rank that
failed, the ranks that give the save up (`give_up`), or rank 0, for which every file is there, and which then publishes.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from model import agreement, contract, cut, parallel, storage
from model.contract import Attempt, File, Manifest
from model.staging import Staged, StagedFile, State, stage

log = logging.getLogger(__name__)

Parts = Mapping[str, State]
Piece = bytes | memoryview

PIECE, HASHED = 8 << 20, 64 << 20
"""Bytes that are written, and hashed, at once: after each a rank looks whether the save is over."""

HASHERS = 2
"""Threads: one core makes some 1.8 GB/s of SHA-256, less than a fast disk takes."""

SLOWEST_LOOK = 0.25
"""Seconds: a throttled rank looks at least this often."""

SEALING = "sealing"
"""The verdict while rank 0 publishes the manifest: too late to give the save up."""

LEAVING_SECONDS = 3.0
"""How long rank 0 waits, of a save that failed, for the ranks that still write, before it removes what is there."""


class ClosedError(Exception):
    """The controller ended this attempt: nothing that it seals from now on counts."""


class GivenUpError(Exception):
    """The ranks gave this save up, in favour of a later one or as the attempt ends."""


@dataclass
class Save:
    """One save, as this rank sees it. `written` grows while it is under way."""

    attempt: Attempt
    step: int
    staged: Staged
    stored: Mapping[str, list[File]]  # parts whose files are in the run already (frozen networks)
    loop: Mapping[str, Any]  # everything that is not a tensor
    model: Mapping[str, Any]  # what an evaluation needs to know of the networks
    store: Store  # where the ranks tell each other; a name space of the savers' own
    number: int  # of this attempt's saves, the same on every rank
    limit: float | None = None  # bytes that this rank writes in a second, at most
    began: float = field(default_factory=time.monotonic)
    written: int = 0  # bytes of files, by this rank

    @property
    def verdict(self) -> str:
        return f"{self.number}/verdict"

    def answer(self, rank: int) -> str:
        return f"{self.number}/{rank}"

    @property
    def outcome(self) -> str:
        return f"{self.number}/outcome"

    def is_over(self) -> bool:
        """Whether there is a verdict."""
        return bool(self.store.check([self.verdict]))


# --- sealing ----------------------------------------------------------------------------------------------------------


def seal(
    attempt: Attempt,
    step: int,
    parts: Parts,
    stored: Mapping[str, list[File]],
    loop: Mapping[str, Any],
    model: Mapping[str, Any],
    store: Store | None = None,
) -> Manifest:
    """Seal the state after `step` updates and wait for it: `own_files`, `stage` and `write` in one.

    `parts`: tensors to write; the rest is as in `Save`. `store`: the ranks' rendezvous store; a process that is alone
    needs none.
    """
    if store is None and parallel.world() > 1:
        raise ValueError("several ranks need the store that they share: what `parallel.join` returned")
    staged = stage(own_files(parts))
    return write(Save(attempt, step, staged, stored, loop, model, store or HashStore(), number=step))


def own_files(parts: Parts) -> Iterator[tuple[str, str, State]]:
    """What this rank writes: part, file name, and the tensors in it. What is whole on every rank is written by one,
    part i by rank i % world; of what is cut every rank writes its rows."""
    for index, part in enumerate(sorted(parts)):
        tensors = parts[part]
        sharded: State = {name: tensor for name, tensor in tensors.items() if cut.is_cut(tensor)}
        if sharded:
            shard, shards = cut.shard_of(next(iter(sharded.values())))
            own: State = {name: tensor for name, tensor in sharded.items() if cut.rows(tensor)}
            if shard == 0:
                own = {**own, **{name: tensor for name, tensor in tensors.items() if name not in sharded}}
            if shard >= 0 and own:
                yield part, f"{part}-{shard:05d}-of-{shards:05d}.safetensors", own
        elif tensors and index % parallel.world() == parallel.rank():
            yield part, f"{part}.safetensors", tensors


def write(save: Save) -> Manifest:
    """Write what is staged; every rank calls it, with the same arguments but for `staged`, and gets the manifest.

    All ranks return, or all raise: ClosedError if the attempt was closed, DiskFullError or another StoreError if any
    rank could not write, GivenUpError after `give_up`. What was half written is then removed; earlier checkpoints are
    not touched. Raises AlreadyPublished, and touches nothing, if that step is sealed.
    """
    files: dict[str, list[File]] = {}
    try:
        save.staged.arrived()
        if parallel.rank() == 0:
            _refuse_if_sealed(save)
            _refuse_if_closed(save.attempt)
        files = _write_files(save)
    except Exception as error:  # whatever it is, the others must hear of it
        agreement.first(save.store, save.verdict, _failure(error))
    save.store.set(save.answer(parallel.rank()), msgspec.json.encode(files).decode())
    if parallel.rank() == 0:
        save.store.set(save.outcome, _concluded(save))
    agreement.wait_for(save.store, [save.outcome])
    return _decoded(save.store.get(save.outcome)).sealed()


FAILURES = (storage.AlreadyPublished, storage.DiskFullError, storage.StoreError, ClosedError, GivenUpError)
"""What the ranks tell each other as what it is, the narrower kinds first; anything else is a RuntimeError to them."""


class Verdict(contract.Record, frozen=True):
    """What comes of a save: the manifest, or a failure."""

    manifest: Manifest | None = None
    kind: str = ""  # of the failure: a name of FAILURES, or empty for anything else
    says: str = ""

    def sealed(self) -> Manifest:
        if self.manifest is not None:
            return self.manifest
        kind: type[Exception] = next((kind for kind in FAILURES if kind.__name__ == self.kind), RuntimeError)
        raise kind(self.says)


def _decoded(text: bytes | str) -> Verdict:
    return contract.decode(text, Verdict, "what a rank said of a save")


def _failure(error: Exception) -> str:
    kind = next((kind.__name__ for kind in FAILURES if isinstance(error, kind)), "")
    if not kind:
        log.error("a save failed", exc_info=error)
    says = str(error) if kind else f"rank {parallel.rank()} could not save: {type(error).__name__}: {error}"
    return contract.encode(Verdict(kind=kind, says=says)).decode()


def give_up(save: Save) -> None:
    """Have the ranks leave a save that is under way, unless its manifest is being published. May be called in any
    thread and on any rank; `write` then raises GivenUpError on all of them, as soon as they notice."""
    error = GivenUpError(f"the save of step {save.step} was given up")
    agreement.first(save.store, save.verdict, _failure(error))


# --- this rank's files ------------------------------------------------------------------------------------------------


def _write_files(save: Save) -> dict[str, list[File]]:
    """Write and hash at the same time: the bytes lie there, so neither has to wait for the other."""
    folder = contract.checkpoint_dir(save.attempt.phase, save.attempt.attempt, save.step)
    written: dict[str, list[File]] = {}
    with ThreadPoolExecutor(HASHERS, "hash") as hasher:
        digests = [hasher.submit(_sha256, save, file) for file in save.staged.files]
        for file, digest in zip(save.staged.files, digests, strict=True):
            path = f"{folder}/{file.name}"
            storage.publish_pieces(f"{save.attempt.run_dir}/{path}", _paced(save, file))
            written.setdefault(file.part, []).append(File(path=path, bytes=file.size, sha256=digest.result()))
    return written


def _sha256(save: Save, file: StagedFile) -> str:
    digest = hashlib.sha256()
    for piece in file.pieces(HASHED):
        _leave_if_over(save)
        digest.update(piece)
    return digest.hexdigest()


def _paced(save: Save, file: StagedFile) -> Iterator[Piece]:
    """The file in pieces, no faster than the save's limit."""
    size = PIECE if save.limit is None else min(PIECE, max(1, int(save.limit * SLOWEST_LOOK)))
    for piece in file.pieces(size):
        _leave_if_over(save)
        yield piece
        save.written += len(piece)
        if save.limit is not None:
            time.sleep(max(0.0, save.began + save.written / save.limit - time.monotonic()))


def _leave_if_over(save: Save) -> None:
    """Raises GivenUpError if the save is over, as it is early where another rank failed."""
    if save.is_over():
        raise GivenUpError(f"the save of step {save.step} is over")


# --- rank 0 -----------------------------------------------------------------------------------------------------------


def _concluded(save: Save) -> str:
    """The outcome, once no rank writes any more: the manifest, which is published now, or the failure."""
    answers = [save.answer(rank) for rank in range(parallel.world())]
    if not agreement.wait_for(save.store, answers, enough=save.is_over):
        last = time.monotonic() + LEAVING_SECONDS
        agreement.wait_for(save.store, answers, enough=lambda: time.monotonic() > last)
    outcome = agreement.first(save.store, save.verdict, SEALING)
    if outcome == SEALING:
        outcome = _publish(save, _join(save, answers))
    verdict = _decoded(outcome)
    if verdict.manifest is None and verdict.kind != storage.AlreadyPublished.__name__:
        _discard(save.attempt, save.step)
    _forget(save, answers)
    return outcome


def _join(save: Save, answers: list[str]) -> dict[str, list[File]]:
    joined: dict[str, list[File]] = {}
    for answer in answers:
        for part, files in msgspec.json.decode(save.store.get(answer), type=dict[str, list[File]]).items():
            joined.setdefault(part, []).extend(files)
    return joined


def _publish(save: Save, written: dict[str, list[File]]) -> str:
    manifest = _manifest(save, {**written, **save.stored})
    try:
        _refuse_if_closed(save.attempt)
        storage.publish(_manifest_path(save.attempt, save.step), contract.seal_manifest(manifest))
    except Exception as error:
        return _failure(error)
    return contract.encode(Verdict(manifest=manifest)).decode()


def _forget(save: Save, answers: list[str]) -> None:
    """Nobody needs them any more: all that every rank has answered, and what came of the save before this one."""
    before = replace(save, number=save.number - 1)
    for key in (*answers, before.verdict, before.outcome):
        save.store.delete_key(key)


def _manifest(save: Save, files: dict[str, list[File]]) -> Manifest:
    attempt = save.attempt
    return Manifest(
        format=contract.FORMAT,
        run_id=attempt.run_id,
        phase=attempt.phase,
        attempt=attempt.attempt,
        step=save.step,
        parts=files,
        loop=dict(save.loop),
        model=dict(save.model),
        world={"nodes": attempt.nodes, "processes": parallel.world()},
        spec_digest=attempt.spec_digest,
        code_digest=attempt.code_digest,
        versions={"torch": str(torch.__version__), "numpy": numpy.__version__, "python": platform.python_version()},
        sealed_at=contract.now(),
        nonce=contract.new_nonce(),
    )


def _refuse_if_sealed(save: Save) -> None:
    path = _manifest_path(save.attempt, save.step)
    if storage.exists(path):
        raise storage.AlreadyPublished(f"{path} is sealed already")


def _refuse_if_closed(attempt: Attempt) -> None:
    closed = f"{attempt.run_dir}/{contract.closed_file(attempt.attempt)}"
    if storage.exists(closed):
        raise ClosedError(f"the controller closed attempt {attempt.attempt} ({closed}): nothing more is sealed")


def _discard(attempt: Attempt, step: int) -> None:
    """Remove a half-written checkpoint, its manifest first. Best effort: without a manifest it is no checkpoint."""
    folder = contract.checkpoint_dir(attempt.phase, attempt.attempt, step)
    try:
        storage.remove(_manifest_path(attempt, step))
        storage.remove_tree(f"{attempt.run_dir}/{folder}")
    except storage.StoreError as error:
        log.warning("left a half-written checkpoint behind: %s", error)


def _manifest_path(attempt: Attempt, step: int) -> str:
    return f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}"
