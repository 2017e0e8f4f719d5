"""Reading sealed checkpoints: whole parts, or the rows of them that a process needs, every file verified.

A checkpoint is what its manifest says. A part may lie in several files, as it was cut over processes when it was sealed
(`model.checkpoint`); each file says which rows of which tensors it holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import contract, storage
from model.contract import Attempt, Bad, CheckpointRef, File, Manifest

log = logging.getLogger(__name__)

State = dict[str, Tensor]

ROWS = "dinoctl-rows"
"""The key in a file's header of the rows that it holds of tensors that it does not hold whole: JSON, name -> [first
row, rows of the whole]."""

HEADER_BYTES = 8
"""A safetensors file begins with the length of its header."""


class CheckpointError(Exception):
    """A checkpoint cannot be used: it is damaged, of another version, or has no such part; the message says which."""


class DamagedError(CheckpointError):
    """A file of the checkpoint `ref` is missing, torn or altered: nobody else will be able to read it either."""

    def __init__(self, ref: CheckpointRef, message: str) -> None:
        super().__init__(message)
        self.ref = ref


def mark(ref: CheckpointRef, why: str, attempt: Attempt) -> None:
    """Say of a damaged checkpoint that it is, so that nobody takes it again; whoever was first may have said so."""
    bad = Bad(why=why, by=f"{attempt.run_dir}, attempt {attempt.attempt}", at=contract.now())
    try:
        with suppress(storage.AlreadyPublished):
            where = contract.bad_file(ref.phase, ref.attempt, ref.step)
            storage.publish(f"{ref.run}/{where}", contract.encode(bad))
    except storage.StoreError as error:  # it may be another run's, which we may only read
        log.warning("%s is damaged and could not be marked: %s", ref, error)


def read_manifest(ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint, with the parts that are still there. Raises DamagedError if there is none or a torn
    one, CheckpointError for one that this version cannot read."""
    where = f"{ref.run}/{contract.manifest_file(ref.phase, ref.attempt, ref.step)}"
    try:
        data = storage.read(where)
        manifest = contract.read_manifest(data, storage.names(ref.path), where)
    except FileNotFoundError as error:
        raise DamagedError(ref, f"{ref} was never sealed, or was pruned: {where} is not there") from error
    except contract.ContractError as error:
        if isinstance(error.__cause__, msgspec.ValidationError):  # JSON, but not as this version writes it
            raise CheckpointError(str(error)) from error
        raise DamagedError(ref, str(error)) from error
    if manifest.format > contract.FORMAT:
        raise CheckpointError(f"{where}: written by a newer dinoctl (format {manifest.format} > {contract.FORMAT})")
    if (manifest.phase, manifest.attempt, manifest.step) != (ref.phase, ref.attempt, ref.step):
        raise CheckpointError(f"{where}: is the manifest of {manifest.phase}@{manifest.step}, not of {ref}")
    return manifest


def dropped(ref: CheckpointRef) -> set[str]:
    """The parts of a checkpoint that were removed on purpose, as only others of it are kept."""
    return contract.kept.dropped(storage.names(ref.path))


def load(ref: CheckpointRef, part: str) -> State:
    """The tensors of one part, on the CPU, size and sha256 of every file verified.

    Raises DamagedError that names the file that is missing, torn or altered, CheckpointError with the parts that there
    are.
    """
    return load_files(ref, read_manifest(ref), part)


def load_files(ref: CheckpointRef, manifest: Manifest, part: str) -> State:
    """As `load`, with a manifest already read."""
    return {name: stored.read(range(stored.rows)) for name, stored in open_part(ref, manifest, part).items()}


def open_part(ref: CheckpointRef, manifest: Manifest, part: str) -> dict[str, Stored]:
    """The tensors of one part, of which only names, shapes and places are read yet.

    Raises CheckpointError if there is no such part, DamagedError if a file of it is not there or no safetensors file,
    or the files do not hold all rows.
    """
    if part not in manifest.parts:
        raise CheckpointError(
            f"{ref} has no part {part!r}, only {', '.join(sorted(manifest.parts))}"
            + ("; it was removed, as nothing kept it" if part in dropped(ref) else "")
        )
    pieces: dict[str, list[_Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in manifest.parts[part]:
        content = _Content(ref, file)
        for name, shape, first, total in content.entries():
            pieces.setdefault(name, []).append(_Piece(content, first, shape[0] if shape else 1))
            shapes[name] = (total, *shape[1:]) if shape else ()
    stored = {name: Stored(name, shapes[name], tuple(found)) for name, found in pieces.items()}
    for one in stored.values():
        if sum(piece.rows for piece in one.pieces) != one.rows:
            raise DamagedError(ref, f"{ref}: the files of {part} do not hold all rows of {one.name}")
    return stored


def _files(manifest: Manifest) -> list[File]:
    return [file for files in manifest.parts.values() for file in files]


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
        """Read it all. Raises DamagedError as `read` does."""
        self.read(range(self.rows))

    def read(self, rows: range) -> Tensor:
        """These rows, on the CPU. Raises DamagedError that names the file that is missing, torn or altered."""
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

    ref: CheckpointRef
    file: File
    kept: State | None = None

    @property
    def where(self) -> str:
        return f"{self.ref.run}/{self.file.path}"

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
            raise self._damaged(f"{self.where}: not a safetensors file: {error}") from error

    def tensors(self) -> State:
        """All of them, size and sha256 of the file verified."""
        if self.kept is None:
            try:
                self.kept = safetensors.torch.load(self._verified())
            except SafetensorError as error:
                raise self._damaged(f"{self.where}: not a safetensors file: {error}") from error
        return self.kept

    def _read(self, start: int, length: int | None) -> bytes:
        try:
            return storage.read(self.where, start, length)
        except FileNotFoundError as error:
            if dropped(self.ref) and self.file not in _files(read_manifest(self.ref)):
                raise CheckpointError(f"{self.where} was removed meanwhile, as nothing kept that part") from error
            raise self._damaged(f"{self.where} is not there, though the manifest names it") from error

    def _verified(self) -> bytes:
        data = self._read(0, None)
        if len(data) != self.file.bytes:
            raise self._damaged(
                f"{self.where}: {len(data)} bytes, and the manifest says {self.file.bytes}: the file is torn"
            )
        if (digest := hashlib.sha256(data).hexdigest()) != self.file.sha256:
            raise self._damaged(
                f"{self.where}: sha256 {digest}, and the manifest says {self.file.sha256}: the file was altered"
            )
        return data

    def _damaged(self, message: str) -> DamagedError:
        return DamagedError(self.ref, message)
