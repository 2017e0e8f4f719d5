"""Checkpoints as the trainer writes them, of a few bytes and without torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from model import contract, storage
from model.contract import CheckpointRef, File, Manifest

PARTS = ("student", "optimizer", "teacher_backbone")


def safetensors(*values: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(values)


def seal(run_dir: str, phase: str, attempt: int, step: int, **stored: list[File]) -> Manifest:
    """stored: parts whose files are there already."""
    parts = dict(stored)
    for index, part in enumerate(one for one in PARTS if one not in stored):
        data = safetensors(attempt, step, index)
        path = f"{contract.checkpoint_dir(phase, attempt, step)}/{part}.safetensors"
        storage.publish(f"{run_dir}/{path}", data)
        parts[part] = [File(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())]
    fields: dict[str, Any] = {
        "format": contract.FORMAT, "run_id": "ab" * 16, "phase": phase, "attempt": attempt, "step": step,
        "parts": parts, "loop": {"step": step}, "model": {}, "world": {"nodes": 1, "processes": 2},
        "spec_digest": "s", "code_digest": "c", "versions": {"torch": "2"}, "sealed_at": 1000.0, "nonce": "n",
    }  # fmt: skip
    manifest = Manifest(**fields)
    storage.publish(f"{run_dir}/{contract.manifest_file(phase, attempt, step)}", contract.seal_manifest(manifest))
    return manifest


def mark(ref: CheckpointRef, why: str = "student.safetensors is torn") -> None:
    bad = contract.Bad(why=why, by="a test", at=1.0)
    storage.publish(f"{ref.run}/{contract.bad_file(ref.phase, ref.attempt, ref.step)}", contract.encode(bad))


def left(run_dir: str, phase: str) -> list[str]:
    """`<attempt>/<step>` of every folder in which something lies."""
    folder = f"{run_dir}/checkpoints/{phase}"
    found = [f"{number}/{step}" for number in storage.names(folder) for step in storage.names(f"{folder}/{number}")]
    return [one for one in found if storage.names(f"{folder}/{one}")]
