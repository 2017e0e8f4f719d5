"""Where an attempt begins: what it reads of checkpoints, byte by byte, and what it does about damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from model import checkpoint, contract, optim, sealed, storage
from model.contract import Attempt, CheckpointRef, Manifest
from model.job import Job, begin
from model.sealed import CheckpointError
from model.stopping import Stop
from tests.model.test_checkpoint import damage
from tests.model.test_text_objective import objective as text_objective
from tests.model.test_train import describe, images, phase_settings, ref_of

__all__ = ["images"]


def alone(attempt: Attempt) -> Job:
    """The job, in this process alone."""
    return begin(attempt, Stop(HashStore(), contract.stop_file(attempt.launch_name)), torch.device("cpu"))


@contextmanager
def begun(attempt: Attempt) -> Iterator[Job]:
    job = alone(attempt)
    try:
        yield job
    finally:
        job.loader.close()


def seal(job: Job, step: int, **stored: Any) -> Manifest:
    """The state as it is, as if it were that after `step` updates."""
    parts = {**job.objective.state(), "optimizer": optim.state(job.optimizer)}
    loop = {**asdict(job.loop), "step": step, "clock": step, "position": step * 16}
    described = {"networks": job.attempt.model, "phase": job.attempt.settings, "tokenizer": None}
    written = {part: tensors for part, tensors in parts.items() if part not in stored}
    return checkpoint.seal(job.attempt, step, written, stored, loop, described)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    attempt = describe(tmp_path_factory.mktemp("once") / "run", images)
    with begun(attempt) as job:
        for step in (4, 8):
            seal(job, step)
    return Path(attempt.run_dir)


@pytest.fixture
def first(once: Path, tmp_path: Path, images: Path) -> Attempt:
    """An attempt of pretrain that sealed steps 4 and 8, in a run of the test's own."""
    shutil.copytree(once, tmp_path / "run")
    return describe(tmp_path / "run", images)


def following(first: Attempt, images: Path, *steps: int, **changes: Any) -> Attempt:
    return describe(Path(first.run_dir), images, 2, resume=[ref_of(first, step) for step in steps], **changes)


def marked(run_dir: str) -> list[str]:
    return storage.names(f"{run_dir}/{contract.BAD_DIR}")


# --- what is read -----------------------------------------------------------------------------------------------------


class Counted:
    """Bytes that went through `model.storage`, by file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        real = storage.read

        def read(path: str, *span: int | None) -> bytes:
            data = real(path, *span)  # type: ignore[arg-type]
            self.bytes[path] = self.bytes.get(path, 0) + len(data)
            return data

        patch.setattr(storage, "read", read)

    def of(self, ref: CheckpointRef) -> dict[str, int]:
        return {Path(path).name: count for path, count in self.bytes.items() if path.startswith(f"{ref.path}/")}


def size(ref: CheckpointRef, name: str) -> int:
    return Path(ref.path, name).stat().st_size


def header(ref: CheckpointRef, name: str) -> int:
    return 8 + int.from_bytes(Path(ref.path, name).read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("kind", "inputs", "parts"),
    [
        ("pretrain", ("weights",), ("teacher_backbone", "teacher_heads")),
        ("gram", ("gram_teacher",), ("teacher_backbone",)),
        ("highres", ("weights", "gram_teacher"), ("teacher_backbone", "teacher_heads")),
    ],
)
def test_a_phase_reads_no_more_than_the_teacher(
    first: Attempt, images: Path, kind: str, inputs: tuple[str, ...], parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = {name: ref_of(first, 4) for name in inputs}
    settings = {**phase_settings(images), "kind": kind, **dict.fromkeys(inputs, "pretrain@4")}
    if kind == "highres":
        settings["gram_teacher"] = "pretrain@4"
    read = Counted(monkeypatch)
    with begun(describe(Path(first.run_dir), images, 2, phase="next", settings=settings, inputs=given)):
        pass
    ref = ref_of(first, 4)
    counts = read.of(ref)
    assert set(counts) == {"manifest.json", *(f"{part}.safetensors" for part in parts)}
    takes = {"teacher_backbone": len(inputs), "teacher_heads": 1}
    for part in parts:
        name = f"{part}.safetensors"
        assert counts[name] == takes[part] * (size(ref, name) + header(ref, name))


def test_a_text_phase_reads_no_more_than_the_teacher() -> None:
    own, asked = text_objective(), []

    def read(part: str) -> Any:
        asked.append(part)
        return own.state()[part]

    own.take("vision_tower", read)
    assert asked == ["teacher_backbone"]


def test_an_evaluation_reads_the_backbone_alone(first: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = ref_of(first, 4)
    read = Counted(monkeypatch)
    assert sealed.load(ref, "teacher_backbone")
    assert set(read.of(ref)) == {"manifest.json", "teacher_backbone.safetensors"}


# --- damaged ones -----------------------------------------------------------------------------------------------------


def flip_a_name(path: Path) -> None:
    """One bit of a tensor's name in the header: a safetensors file still, with other tensors in it."""
    data = bytearray(path.read_bytes())
    at = data.index(b"cls_token")
    data[at] ^= 1
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "how", ["missing", "torn", "flipped", "renamed", "no manifest", "half a manifest", "loop of a manifest"]
)
def test_a_damaged_one_is_named_marked_and_passed_over(first: Attempt, images: Path, how: str) -> None:
    ref = ref_of(first, 8)
    manifest, shard = Path(ref.path, "manifest.json"), Path(ref.path, "student.safetensors")
    file = manifest if "manifest" in how else shard
    if how == "renamed":
        flip_a_name(shard)
    elif how == "loop of a manifest":
        whole = manifest.read_bytes()
        manifest.write_bytes(whole.replace(b'"loop":{"step":8', b'"loop":{"step":9'))
        assert manifest.read_bytes() != whole
    else:
        damage(file, {"no manifest": "missing", "half a manifest": "torn"}.get(how, how))
    with begun(following(first, images, 8, 4)) as job:
        assert job.loop.step == 4
    assert marked(first.run_dir) == ["pretrain-1-8.json"]
    path = f"{first.run_dir}/{contract.bad_file('pretrain', 1, 8)}"
    mark = contract.decode(storage.read(path), contract.Bad, path)
    assert str(file) in mark.why
    assert mark.by == f"{first.run_dir}, attempt 2"


def test_nothing_left_to_go_on_from(first: Attempt, images: Path) -> None:
    for step in (4, 8):
        damage(Path(ref_of(first, step).path, "optimizer.safetensors"), "flipped")
    with pytest.raises(CheckpointError, match=r"pretrain@8 .*optimizer.*altered.*pretrain@4 .*optimizer.*altered"):
        alone(following(first, images, 8, 4))
    assert marked(first.run_dir) == ["pretrain-1-4.json", "pretrain-1-8.json"]


@pytest.mark.parametrize("how", ["torn", "renamed"])
def test_a_damaged_input_is_named_and_marked(first: Attempt, images: Path, how: str) -> None:
    file = Path(ref_of(first, 8).path, "teacher_backbone.safetensors")
    flip_a_name(file) if how == "renamed" else damage(file, how)
    attempt = describe(Path(first.run_dir), images, 2, phase="next", inputs={"weights": ref_of(first, 8)})
    with pytest.raises(CheckpointError, match=r"teacher_backbone\.safetensors"):
        alone(attempt)
    assert marked(first.run_dir) == ["pretrain-1-8.json"]


def test_a_store_that_fails_is_no_damage(first: Attempt, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, newest = storage.read, ref_of(first, 8)

    def read(path: str, *span: Any) -> bytes:
        if path.startswith(f"{newest.path}/student"):
            raise storage.StoreError("503 Slow Down")
        return real(path, *span)

    monkeypatch.setattr(storage, "read", read)
    with begun(following(first, images, 8, 4)) as job:
        assert job.loop.step == 4
    attempt = describe(Path(first.run_dir), images, 2, phase="next", inputs={"init": newest})
    with pytest.raises(storage.StoreError, match="503"):
        alone(attempt)
    assert marked(first.run_dir) == []


def test_what_another_version_wrote_is_no_damage(first: Attempt, images: Path) -> None:
    manifest = Path(ref_of(first, 8).path, "manifest.json")
    newer = {**json.loads(manifest.read_bytes()), "format": contract.FORMAT + 1}
    del newer["sha256"]
    manifest.write_text(json.dumps(newer))
    with begun(following(first, images, 8, 4)) as job:
        assert job.loop.step == 4
    assert marked(first.run_dir) == []


# --- forks ------------------------------------------------------------------------------------------------------------


def test_a_fork_does_not_refer_to_files_of_the_other_run(first: Attempt, images: Path, tmp_path: Path) -> None:
    """A manifest names files of its own run: a frozen network is stored anew in a fork."""
    settings = {**phase_settings(images), "kind": "gram", "gram_teacher": "pretrain@4", "init": "pretrain@8"}
    inputs = {"init": ref_of(first, 8), "gram_teacher": ref_of(first, 4)}
    gram = describe(Path(first.run_dir), images, 2, phase="gram", settings=settings, inputs=inputs)
    with begun(gram) as job:
        assert list(job.stored) == ["gram_teacher"]
        seal(job, 4, **job.stored)
    with begun(
        describe(Path(first.run_dir), images, 3, phase="gram", settings=settings, resume=[ref_of(gram, 4)])
    ) as job:
        assert list(job.stored) == ["gram_teacher"]
    fork = describe(tmp_path / "fork", images, 1, phase="gram", settings=settings, resume=[ref_of(gram, 4)])
    with begun(fork) as job:
        assert job.stored == {}
