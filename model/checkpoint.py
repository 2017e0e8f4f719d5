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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor

from model import contract, parallel, sealed, sharding, storage
from model.contract import Attempt, File, Manifest

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Parts = Mapping[str, State]


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
    return safetensors.torch.save(own, {sealed.ROWS: json.dumps(cut)} if cut else None)


def _manifest_path(attempt: Attempt, step: int) -> str:
    return f"{attempt.run_dir}/{contract.manifest_file(attempt.phase, attempt.attempt, step)}"
