"""Sealed checkpoints: parts as safetensors files, then the manifest that alone makes them a checkpoint.

The ranks write the parts, each file whole, exclusive and on disk before its size and sha256 are gathered; rank 0
publishes `manifest.json` last. Whatever dies before that leaves a folder without a manifest, which is no checkpoint.
No pickle: tensors are safetensors, all else is JSON in the manifest.

A part that is cut over processes (`model.sharding`) is as many files as there are shards. Each says which rows of which
tensors it holds, so that any other number of processes can read just what it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import contract, parallel, sharding, storage
from model.config import Checkpoints
from model.contract import Attempt, CheckpointRef, File, Manifest

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Parts = Mapping[str, State]


ROWS = "dinoctl-rows"
"""The key in a file's header of the rows that it holds of tensors that it does not hold whole: JSON, name -> [first
row, rows of the whole]."""

HEADER_BYTES = 8
"""A safetensors file begins with the length of its header."""


class CheckpointError(Exception):
    """A checkpoint is not there, or a file of it is not what its manifest says; the message names the file."""


class ClosedError(Exception):
    """The controller ended this attempt: nothing that it seals from now on counts."""


# --- sealing ----------------------------------------------------------------------------------------------------------


def seal(
    attempt: Attempt,
    step: int,
    parts: Parts,
    stored: Mapping[str, list[File]],
    loop: Mapping[str, Any],
    model: Mapping[str, Any],
) -> Manifest:
    """Seal the state after `step` updates. Every rank calls it, with the same arguments, and gets the manifest.

    `parts`: tensors to write. What is whole on every rank is written by one, part i by rank i % world; of what is cut
    every rank writes its rows. `stored`: parts whose
    files are in the run already (frozen networks), which the manifest refers to. `loop`: everything that is not a
    tensor. `model`: what an evaluation needs to know of the networks.

    All ranks return, or all raise: ClosedError if the attempt was closed, DiskFullError or another StoreError if any
    rank could not write. What was half written is then removed; earlier checkpoints are not touched.
    Raises AlreadyPublished, and touches nothing, if that step is sealed.
    """
    if storage.exists(_manifest_path(attempt, step)):
        raise storage.AlreadyPublished(f"{_manifest_path(attempt, step)} is sealed already")
    try:
        written = _together(lambda: _write_parts(attempt, step, parts))
        manifest = _manifest(attempt, step, {**written, **stored}, loop, model)
        _together(lambda: _publish_manifest(attempt, manifest))
    except (storage.StoreError, ClosedError):
        if parallel.rank() == 0:
            _discard(attempt, step)
        raise
    return manifest


def _write_parts(attempt: Attempt, step: int, parts: Parts) -> dict[str, list[File]]:
    _refuse_if_closed(attempt)
    folder = contract.checkpoint_dir(attempt.phase, attempt.attempt, step)
    written: dict[str, list[File]] = {}
    for index, part in enumerate(sorted(parts)):
        for name, tensors in _own_files(part, parts[part], index):
            data = _serialise(tensors)
            path = f"{folder}/{name}"
            storage.publish(f"{attempt.run_dir}/{path}", data)
            written.setdefault(part, []).append(
                File(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            )
    return written


def _own_files(part: str, tensors: State, index: int) -> Iterator[tuple[str, State]]:
    """What this rank writes of a part: file names, and the tensors in each."""
    cut = {name: tensor for name, tensor in tensors.items() if sharding.is_cut(tensor)}
    if cut:
        shard, shards = sharding.shard_of(next(iter(cut.values())))
        own = {name: tensor for name, tensor in cut.items() if sharding.rows(tensor)}
        if shard == 0:
            own = {**own, **{name: tensor for name, tensor in tensors.items() if name not in cut}}
        if shard >= 0 and own:
            yield f"{part}-{shard:05d}-of-{shards:05d}.safetensors", own
    elif tensors and index % parallel.world() == parallel.rank():
        yield f"{part}.safetensors", tensors


def _publish_manifest(attempt: Attempt, manifest: Manifest) -> dict[str, list[File]]:
    if parallel.rank() == 0:
        _refuse_if_closed(attempt)
        storage.publish(_manifest_path(attempt, manifest.step), contract.encode(manifest))
    return {}


def _manifest(
    attempt: Attempt, step: int, files: dict[str, list[File]], loop: Mapping[str, Any], model: Mapping[str, Any]
) -> Manifest:
    return Manifest(
        format=contract.FORMAT,
        run_id=attempt.run_id,
        phase=attempt.phase,
        attempt=attempt.attempt,
        step=step,
        parts=files,
        loop=dict(loop),
        model=dict(model),
        world={"nodes": attempt.nodes, "processes": parallel.world()},
        spec_digest=attempt.spec_digest,
        code_digest=attempt.code_digest,
        versions={"torch": str(torch.__version__), "numpy": numpy.__version__, "python": platform.python_version()},
        sealed_at=contract.now(),
        nonce=contract.new_nonce(),
    )


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


FAILURES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (storage.StoreError, storage.AlreadyPublished, storage.DiskFullError, ClosedError)
}


def _together(work: Callable[[], dict[str, list[File]]]) -> dict[str, list[File]]:
    """Do it on every rank and join the answers; if it failed on any rank, every rank raises the first failure."""
    answer: dict[str, Any]
    try:
        answer = {"files": {part: [contract.encode(f).decode() for f in files] for part, files in work().items()}}
    except (storage.StoreError, ClosedError) as error:
        answer = {"failure": {"kind": type(error).__name__, "says": str(error)}}
    answers = [json.loads(text) for text in parallel.gather_text(json.dumps(answer))]
    for failure in (answer["failure"] for answer in answers if "failure" in answer):
        raise FAILURES[failure["kind"]](failure["says"])
    joined: dict[str, list[File]] = {}
    for answer in answers:
        for part, files in answer["files"].items():
            joined.setdefault(part, []).extend(contract.decode(file, File, part) for file in files)
    return joined


def _serialise(tensors: State) -> bytes:
    cut = {
        name: [rows.start, tensor.shape[0]]
        for name, tensor in tensors.items()
        if len(rows := sharding.rows(tensor)) < (tensor.shape[0] if tensor.ndim else 1)
    }
    own = {name: sharding.local(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, {ROWS: json.dumps(cut)} if cut else None)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError if there is none, or none that this version can read."""
    where = f"{ref.run}/{contract.manifest_file(ref.phase, ref.attempt, ref.step)}"
    try:
        data = storage.read(where)
        manifest = contract.decode(data, Manifest, where)
    except FileNotFoundError as error:
        raise CheckpointError(f"{ref} was never sealed, or was pruned: {where} is not there") from error
    except contract.ContractError as error:
        raise CheckpointError(str(error)) from error
    if manifest.format > contract.FORMAT:
        raise CheckpointError(f"{where}: written by a newer dinoctl (format {manifest.format} > {contract.FORMAT})")
    if (manifest.phase, manifest.attempt, manifest.step) != (ref.phase, ref.attempt, ref.step):
        raise CheckpointError(f"{where}: is the manifest of {manifest.phase}@{manifest.step}, not of {ref}")
    return manifest


def load(ref: CheckpointRef, part: str) -> State:
    """The tensors of one part, on the CPU, size and sha256 of every file verified.

    Raises CheckpointError that names the file that is missing, torn or altered, or the parts that there are.
    """
    return load_files(ref, read_manifest(ref), part)


def load_files(ref: CheckpointRef, manifest: Manifest, part: str) -> State:
    """As `load`, with a manifest already read."""
    return {name: stored.read(range(stored.rows)) for name, stored in open_part(ref, manifest, part).items()}


def open_part(ref: CheckpointRef, manifest: Manifest, part: str) -> dict[str, Stored]:
    """The tensors of one part, of which only names, shapes and places are read yet.

    Raises CheckpointError if the part, or a file of it, is not there, or the files do not hold all rows.
    """
    if part not in manifest.parts:
        raise CheckpointError(f"{ref} has no part {part!r}, only {', '.join(sorted(manifest.parts))}")
    pieces: dict[str, list[_Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in manifest.parts[part]:
        content = _Content(f"{ref.run}/{file.path}", file)
        for name, shape, first, total in content.entries():
            pieces.setdefault(name, []).append(_Piece(content, first, shape[0] if shape else 1))
            shapes[name] = (total, *shape[1:]) if shape else ()
    stored = {name: Stored(name, shapes[name], tuple(found)) for name, found in pieces.items()}
    for one in stored.values():
        if sum(piece.rows for piece in one.pieces) != one.rows:
            raise CheckpointError(f"{ref}: the files of {part} do not hold all rows of {one.name}")
    return stored


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint. Its files are read, each once and whole, as its rows are asked for."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def verify(self) -> None:
        """Read it all. Raises CheckpointError as `read` does."""
        self.read(range(self.rows))

    def read(self, rows: range) -> Tensor:
        """These rows, on the CPU. Raises CheckpointError that names the file that is missing, torn or altered."""
        parts = []
        for piece in sorted(self.pieces, key=lambda piece: piece.first):
            start, stop = max(rows.start, piece.first), min(rows.stop, piece.first + piece.rows)
            if start < stop:
                tensor = piece.content.tensors()[self.name]
                parts.append(tensor[start - piece.first : stop - piece.first] if self.shape else tensor)
        if not parts:
            return torch.empty((0, *self.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Piece:
    content: _Content
    first: int  # row of the whole tensor
    rows: int


@dataclass
class _Content:
    """A file of a part; what was read of it is kept as long as the part is being read."""

    where: str
    file: File
    kept: State | None = None

    def entries(self) -> Iterator[tuple[str, list[int], int, int]]:
        """Name and shape of each tensor in it, its first row in the whole one, and how many rows that has."""
        head = self._read(0, HEADER_BYTES)
        size = int.from_bytes(head, "little")
        try:
            header = json.loads(self._read(len(head), min(size, self.file.bytes)))
            cut = json.loads(header.pop("__metadata__", {}).get(ROWS, "{}"))
            for name, entry in header.items():
                shape = entry["shape"]
                yield name, shape, *cut.get(name, (0, shape[0] if shape else 1))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.where}: not a safetensors file: {error}") from error

    def tensors(self) -> State:
        """All of them, size and sha256 of the file verified."""
        if self.kept is None:
            try:
                self.kept = safetensors.torch.load(_verified(self.where, self.file))
            except SafetensorError as error:
                raise CheckpointError(f"{self.where}: not a safetensors file: {error}") from error
        return self.kept

    def _read(self, start: int, length: int) -> bytes:
        try:
            return storage.read_range(self.where, start, length)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.where} is not there, though the manifest names it") from error


def _verified(where: str, file: File) -> bytes:
    try:
        data = storage.read(where)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is not there, though the manifest names it") from error
    if len(data) != file.bytes:
        raise CheckpointError(f"{where}: {len(data)} bytes, and the manifest says {file.bytes}: the file is torn")
    if (digest := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise CheckpointError(f"{where}: sha256 {digest}, and the manifest says {file.sha256}: the file was altered")
    return data


# --- retention --------------------------------------------------------------------------------------------------------


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
        storage.remove(_manifest_path(attempt, step))
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


def _manifest_path(attempt: Attempt, step: int) -> str:
    return f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}"
