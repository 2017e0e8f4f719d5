"""Sealed checkpoints: parts as safetensors files, then the manifest that alone makes them a checkpoint.

The ranks write the parts, each file whole, exclusive and on disk before its size and sha256 are gathered; rank 0
publishes `manifest.json` last. Whatever dies before that leaves a folder without a manifest, which is no checkpoint.
No pickle: tensors are safetensors, all else is JSON in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import contract, parallel, storage
from model.config import Checkpoints
from model.contract import Attempt, CheckpointRef, File, Manifest

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Parts = Mapping[str, State]


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

    `parts`: tensors to write, replicated on every rank; part i is written by rank i % world. `stored`: parts whose
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
    written = {}
    for index, part in enumerate(sorted(parts)):
        if index % parallel.world() == parallel.rank() and parts[part]:
            data = _serialise(parts[part])
            name = f"{folder}/{part}.safetensors"
            storage.publish(f"{attempt.run_dir}/{name}", data)
            written[part] = [File(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())]
    return written


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
    return {
        part: [contract.decode(file, File, part) for file in files]
        for answer in answers
        for part, files in answer["files"].items()
    }


def _serialise(tensors: State) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def find_stored(tensors: State, files: Iterable[File]) -> list[File] | None:
    """The one of `files` that holds exactly these tensors, if any: a frozen network is stored once in a run."""
    data = _serialise(tensors)
    digest = hashlib.sha256(data).hexdigest()
    return next(([file] for file in files if (file.bytes, file.sha256) == (len(data), digest)), None)


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
    if part not in manifest.parts:
        raise CheckpointError(f"{ref} has no part {part!r}, only {', '.join(sorted(manifest.parts))}")
    tensors: State = {}
    for file in manifest.parts[part]:
        where = f"{ref.run}/{file.path}"
        try:
            tensors.update(safetensors.torch.load(_verified(where, file)))
        except SafetensorError as error:
            raise CheckpointError(f"{where}: not a safetensors file: {error}") from error
    return tensors


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
