"""Checkpoints on a real disk: sealed, torn, altered, closed, full, pruned; by one process and by two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint, contract, retention, sealed, storage
from model.config import Checkpoints
from model.contract import Attempt, CheckpointRef, Manifest
from tests.model.test_parallel import run_ranks

PARTS = {
    "student": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
    "optimizer": {"exp_avg/w": torch.full((2, 3), 0.5), "half": torch.ones(4, dtype=torch.bfloat16)},
}


def make_attempt(run_dir: Path | str, number: int = 1, **changes: Any) -> Attempt:
    values: dict[str, Any] = {
        "format": contract.FORMAT, "run": "r", "run_id": "ab" * 16, "run_dir": str(run_dir), "attempt": number,
        "phase": "pretrain", "launch_name": "r-abababab-pretrain-1", "seed": 0, "model": {}, "settings": {},
        "inputs": {}, "resume": [], "keep_steps": [], "nodes": 1, "processes_per_node": 1, "threads": 1,
        "code_dir": "", "on_end": [], "spec_digest": "", "code_digest": "",
    }  # fmt: skip
    return Attempt(**{**values, **changes})


def ref(attempt: Attempt, step: int) -> CheckpointRef:
    return CheckpointRef(run=attempt.run_dir, phase=attempt.phase, attempt=attempt.attempt, step=step)


def seal(attempt: Attempt, step: int, **stored: Any) -> Manifest:
    return checkpoint.seal(attempt, step, PARTS, stored, {"step": step}, {"networks": {}})


def test_what_was_sealed_is_loaded(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    manifest = seal(attempt, 5)
    assert sealed.read_manifest(ref(attempt, 5)) == manifest
    assert manifest.loop == {"step": 5}
    for part, tensors in PARTS.items():
        loaded = sealed.load(ref(attempt, 5), part)
        assert loaded.keys() == tensors.keys()
        assert all(
            loaded[name].dtype == tensor.dtype and loaded[name].equal(tensor) for name, tensor in tensors.items()
        )
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pkl", ".tmp")]


def test_a_step_is_sealed_once(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    manifest = seal(attempt, 5)
    with pytest.raises(storage.AlreadyPublished):
        seal(attempt, 5)
    assert sealed.read_manifest(ref(attempt, 5)) == manifest
    assert sealed.load(ref(attempt, 5), "student")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "torn":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(("how", "says"), [("missing", "not there"), ("torn", "torn"), ("flipped", "altered")])
def test_a_damaged_file_is_named(tmp_path: Path, how: str, says: str) -> None:
    attempt = make_attempt(tmp_path)
    file = seal(attempt, 5).parts["student"][0]
    damage(tmp_path / file.path, how)
    with pytest.raises(sealed.CheckpointError, match=f"student.safetensors.*{says}"):
        sealed.load(ref(attempt, 5), "student")
    assert sealed.load(ref(attempt, 5), "optimizer")


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    seal(attempt, 5)
    path = tmp_path / contract.manifest_file("pretrain", 1, 5)
    whole = json.loads(path.read_bytes())
    del whole["sha256"]
    with pytest.raises(sealed.CheckpointError, match="never sealed, or was pruned"):
        sealed.read_manifest(ref(attempt, 6))
    for text, says in [
        (json.dumps(whole)[:-9], "not a Manifest"),
        (json.dumps({**whole, "format": 99}), "newer dinoctl"),
        (json.dumps({**whole, "step": 6}), "not of pretrain@5"),
    ]:
        path.write_text(text)
        with pytest.raises(sealed.CheckpointError, match=says):
            sealed.read_manifest(ref(attempt, 5))


def test_a_manifest_in_which_anything_was_altered_is_damaged(tmp_path: Path) -> None:
    """Its loop state, its checksums of the files, its own checksum: each digit of it."""
    attempt = make_attempt(tmp_path)
    manifest = seal(attempt, 5)
    path = tmp_path / contract.manifest_file("pretrain", 1, 5)
    whole = path.read_bytes()
    assert json.loads(whole)["loop"] == {"step": 5}, "it is JSON like any other"
    name_of_its_own = whole.rindex(b'"sha256"')
    digits = [at for at, byte in enumerate(whole) if chr(byte).isdecimal()]
    for at in [at for at in digits if not name_of_its_own < at < name_of_its_own + 8]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(sealed.DamagedError, match="it was altered"):
            sealed.read_manifest(ref(attempt, 5))
    path.write_bytes(contract.encode(manifest))  # as versions before wrote them
    assert sealed.read_manifest(ref(attempt, 5)) == manifest


def test_a_part_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    seal(attempt, 5)
    with pytest.raises(sealed.CheckpointError, match="'gram_teacher', only optimizer, student"):
        sealed.load(ref(attempt, 5), "gram_teacher")


def test_a_closed_attempt_seals_nothing(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    seal(attempt, 5)
    storage.publish(f"{tmp_path}/{contract.closed_file(1)}", b"{}")
    with pytest.raises(checkpoint.ClosedError, match="attempt 1"):
        seal(attempt, 10)
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 1, 10)).exists()
    assert sealed.load(ref(attempt, 5), "student")


FULL = """
import resource, sys
from pathlib import Path
import torch
from model import checkpoint, retention, sealed, storage
from tests.model.test_checkpoint import make_attempt, seal

attempt = make_attempt(Path(sys.argv[1]))
seal(attempt, 5)
if sys.argv[2] == "ulimit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
large = {"optimizer": {"m": torch.ones(300_000)}, "student": {"w": torch.ones(3)}}
try:
    checkpoint.seal(attempt, 10, large, {}, {}, {})
except storage.DiskFullError as error:
    print(error)
    raise SystemExit(86)
"""


def fill(folder: Path, how: str, prefix: list[str]) -> None:
    result = subprocess.run(
        [*prefix, sys.executable, "-P", "-c", FULL, str(folder), how],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 86, result.stdout + result.stderr
    assert "optimizer.safetensors" in result.stdout


def check_after_full_disk(folder: Path) -> None:
    attempt = make_attempt(folder)
    assert not (folder / contract.checkpoint_dir("pretrain", 1, 10)).exists()
    assert sealed.load(ref(attempt, 5), "student")["w"].equal(PARTS["student"]["w"])


@pytest.mark.jobs
def test_a_file_size_limit_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    fill(tmp_path, "ulimit", [])
    check_after_full_disk(tmp_path)


@pytest.mark.jobs
@pytest.mark.requires("mount")
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True)
    try:
        fill(tmp_path, "disk", [])
        check_after_full_disk(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_frozen_part_is_stored_once(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    first = seal(attempt, 5)
    stored = first.parts["student"]
    later = make_attempt(tmp_path, 2)
    checkpoint.seal(later, 7, {"optimizer": PARTS["optimizer"]}, {"gram_teacher": stored}, {}, {})
    loaded = sealed.load(ref(later, 7), "gram_teacher")
    assert loaded["w"].equal(PARTS["student"]["w"])
    assert not (tmp_path / contract.checkpoint_dir("pretrain", 2, 7) / "gram_teacher.safetensors").exists()


def test_retention(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, keep_steps=[2])
    storage.publish(f"{tmp_path}/{contract.PINS_DIR}/pretrain-1-3-c0ffee.json", b"{}")
    storage.publish(f"{tmp_path}/{contract.PINS_DIR}/pretrain-1-13.json", b"{}")
    all_of_them = {step: seal(attempt, step) for step in (1, 2, 3, 4, 5, 6, 7, 8)}
    left = retention.prune(attempt, Checkpoints(every=1, keep_last=2, keep_every=4), all_of_them)
    assert sorted(left) == [2, 3, 4, 7, 8]
    assert storage.names(f"{tmp_path}/checkpoints/pretrain/1") == ["2", "3", "4", "7", "8"]


def test_a_worker_whose_attempt_is_closed_removes_nothing(tmp_path: Path) -> None:
    """Its successor may be reading; what it sealed and nobody counted is the controller's to remove."""
    attempt = make_attempt(tmp_path)
    sealed_ones = {step: seal(attempt, step) for step in (1, 2, 3)}
    storage.publish(f"{tmp_path}/{contract.closed_file(1)}", b"{}")
    left = retention.prune(attempt, Checkpoints(every=1, keep_last=1), sealed_ones)
    assert left == sealed_ones
    for step in sealed_ones:
        assert sealed.load(ref(attempt, step), "student")


def test_a_pin_that_comes_while_the_worker_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = make_attempt(tmp_path)
    sealed_ones = {step: seal(attempt, step) for step in (1, 2)}
    real = storage.remove

    def pinned_first(path: str) -> None:
        if path.endswith("/1/manifest.json"):
            storage.publish(f"{tmp_path}/{contract.pin_file('pretrain', 1, 1, 'c0ffee-init')}", b"{}")
        real(path)

    monkeypatch.setattr(storage, "remove", pinned_first)
    settings = Checkpoints(every=1, keep_last=1)
    left = retention.prune(attempt, settings, sealed_ones)
    assert sorted(left) == [1, 2]
    assert sealed.load(ref(attempt, 1), "optimizer")
    assert sorted(retention.prune(attempt, settings, left)) == [1, 2]


def test_a_file_that_a_kept_manifest_needs_outlives_its_own_checkpoint(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path)
    settings = Checkpoints(every=1, keep_last=1)
    left = {1: checkpoint.seal(attempt, 1, {**PARTS, "gram_teacher": PARTS["student"]}, {}, {}, {})}
    frozen = left[1].parts["gram_teacher"]
    for step in (2, 3):
        left[step] = seal(attempt, step, gram_teacher=frozen)
        left = retention.prune(attempt, settings, left)
    assert sealed.load(ref(attempt, 3), "gram_teacher")["w"].equal(PARTS["student"]["w"])
    assert storage.names(f"{tmp_path}/checkpoints/pretrain/1/1") == ["gram_teacher.safetensors"]
    left[4] = seal(attempt, 4)  # the Gram teacher was refreshed: nothing needs the old one
    assert sorted(retention.prune(attempt, settings, left)) == [4]
    assert storage.names(f"{tmp_path}/checkpoints/pretrain/1") == ["4"]


def test_the_parts_that_nobody_takes_go_once_a_checkpoint_is_old(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, keep_steps=[1, 2], keep_parts={1: ["student"]})
    settings, left = Checkpoints(every=1, keep_last=1), {1: seal(attempt, 1)}
    assert retention.prune(attempt, settings, left) == left, "the newest has all of them"
    left |= {2: seal(attempt, 2), 3: seal(attempt, 3)}
    left = retention.prune(attempt, settings, left)
    assert {step: sorted(manifest.parts) for step, manifest in left.items()} == {
        1: ["student"], 2: ["optimizer", "student"], 3: ["optimizer", "student"],
    }  # fmt: skip
    assert storage.names(ref(attempt, 1).path) == ["manifest.json", "optimizer.dropped", "student.safetensors"]
    assert left == {step: sealed.read_manifest(ref(attempt, step)) for step in left}
    with pytest.raises(sealed.CheckpointError, match="no part 'optimizer', only student; it was removed"):
        sealed.load(ref(attempt, 1), "optimizer")
    assert retention.prune(attempt, settings, left) == left


def test_a_part_that_is_frozen_stays_for_those_that_name_it(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, keep_steps=[1, 2], keep_parts={1: ["student"], 2: ["student"]})
    settings = Checkpoints(every=1, keep_last=1)
    left = {1: checkpoint.seal(attempt, 1, {**PARTS, "gram_teacher": PARTS["student"]}, {}, {}, {})}
    frozen = left[1].parts["gram_teacher"]
    for step in (2, 3):
        left[step] = seal(attempt, step, gram_teacher=frozen)
        left = retention.prune(attempt, settings, left)
    assert [sorted(left[step].parts) for step in (1, 2)] == [["student"], ["student"]]
    assert sealed.load(ref(attempt, 3), "gram_teacher")["w"].equal(PARTS["student"]["w"])
    assert "gram_teacher.safetensors" in storage.names(ref(attempt, 1).path)


def test_a_pin_that_comes_meanwhile_keeps_the_worker_from_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = make_attempt(tmp_path, keep_steps=[1], keep_parts={1: ["student"]})
    left, real = {step: seal(attempt, step) for step in (1, 2)}, storage.publish

    def pinned_first(path: str, data: bytes) -> None:
        monkeypatch.undo()
        storage.publish(f"{tmp_path}/{contract.pin_file('pretrain', 1, 1, 'c0ffee-init')}", b'{"parts": ["optimizer"]}')
        real(path, data)

    monkeypatch.setattr(storage, "publish", pinned_first)
    assert retention.prune(attempt, Checkpoints(every=1, keep_last=1), left) == left
    assert sealed.load(ref(attempt, 1), "optimizer")


TWO_RANKS = """
import resource, sys
from pathlib import Path
import torch
from model import checkpoint, parallel, retention, sealed, storage
from tests.model.test_checkpoint import PARTS, make_attempt, ref, seal

store = parallel.join("gloo")
attempt = make_attempt(Path(sys.argv[1]))
manifest = checkpoint.seal(attempt, 5, PARTS, {}, {"step": 5}, {"networks": {}}, store)
assert sealed.read_manifest(ref(attempt, 5)) == manifest
assert sorted(manifest.parts) == sorted(PARTS)
if parallel.rank() == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    checkpoint.seal(attempt, 10, {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3000)}}, {}, {}, {}, store)
except storage.DiskFullError:
    parallel.leave()
    raise SystemExit(86)
"""


@pytest.mark.jobs
def test_two_ranks_share_the_parts_and_each_others_failures(tmp_path: Path) -> None:
    for result in run_ranks(TWO_RANKS, 2, str(tmp_path)):
        assert result.returncode == 86, result.stderr
    check_after_full_disk(tmp_path)
