"""Damaged checkpoints, full disks, unreadable images, a run of a newer dinoctl."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from model import contract
from tests.jobs.harness import PATIENCE, Job, hold, part_of_tiny, same_weights, wait_until

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]

MakeJob = Callable[..., Job]
ONE = ("pretrain",)


@pytest.fixture
def job(make_job: MakeJob) -> Job:
    """The first phase alone, which ends as the reference's does."""
    job = make_job()
    return make_job(file=part_of_tiny(job.folder / "one.yaml", ONE))


def stopped_at_its_third_checkpoint(job: Job) -> list[int]:
    """Submit, and stop behind step 12: the steps that are sealed."""
    dinoctl = job.start(job.submit("checkpoints.keep_last=3"))
    moment = hold(job, "pretrain", 12)
    dinoctl.send_signal(signal.SIGTERM)
    wait_until(moment.asked, "the agent to ask the ranks to stop")
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 130, job.output()
    job.no_process_is_left()
    steps: list[int] = job.end(1)["steps"]
    assert len(steps) == 3
    return steps


def test_a_torn_shard_and_a_lost_manifest_are_passed_over(reference: Job, job: Job) -> None:
    first, second, third = stopped_at_its_third_checkpoint(job)
    shard = job.run_dir / contract.checkpoint_dir("pretrain", 1, third) / "teacher_backbone.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    (job.run_dir / contract.manifest_file("pretrain", 1, second)).unlink()

    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 0, job.output()
    said = job.output()
    assert str(shard) in said
    assert "torn" in said
    assert f"cannot resume from pretrain@{second}" in said
    assert f"goes on from pretrain@{first} " in said
    assert job.steps(2)[0] == first + 1
    same_weights(job, reference, ONE)
    assert marked(job) == [f"pretrain-1-{second}.json", f"pretrain-1-{third}.json"]
    # What is left of attempt 1: the bad one stays until three whole ones, as keep_last says, are newer.
    assert [(step, attempt) for step, attempt in job.sealed("pretrain") if attempt == 2] == [(12, 2), (18, 2), (20, 2)]
    assert [file.name for file in (job.run_dir / "checkpoints/pretrain/1").iterdir()] == [str(third)]


def marked(job: Job) -> list[str]:
    return sorted(file.name for file in (job.run_dir / contract.BAD_DIR).iterdir())


def test_a_bad_checkpoint_is_found_by_hand_and_never_picked_again(reference: Job, job: Job) -> None:
    """`ckpt verify` names the file whose bit is flipped; the trainer then does not even try it."""
    first, second, third = stopped_at_its_third_checkpoint(job)
    whole = job.dinoctl(["ckpt", "verify", job.name])
    assert (whole.returncode, whole.stdout.count(": whole, ")) == (0, 3), whole.stdout
    shard = job.run_dir / contract.checkpoint_dir("pretrain", 1, third) / "optimizer.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = job.dinoctl(["ckpt", "verify", f"{job.name}#pretrain@{third}", "--mark"])
    assert found.returncode == 1, found.stdout
    assert f"{shard}: sha256 " in found.stdout
    # An input that names it is refused, with what to do.
    refused = job.dinoctl([*job.submit("--fork", f"{job.name}#pretrain@{third}")[:2], "--run", "other", "--fork",
                           f"{job.name}#pretrain@{third}", f"data.path={job.images}"])  # fmt: skip
    assert refused.returncode == 2, refused.stdout
    assert "that checkpoint is damaged" in refused.stdout
    assert "dinoctl ckpt verify" in refused.stdout

    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 0, job.output()
    assert [ref.step for ref in job.attempt(2).resume] == [second, first]
    assert "cannot resume from" not in job.output()
    same_weights(job, reference, ONE)


def test_no_checkpoint_left_to_go_on_from_is_not_a_silent_restart(job: Job) -> None:
    for step in stopped_at_its_third_checkpoint(job):
        (job.run_dir / contract.manifest_file("pretrain", 1, step)).unlink()
    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 1, job.output()
    summary = job.status()["summary"]
    assert (summary["status"], summary["cause"]) == ("failed", "bad-checkpoint")
    assert job.steps(2) == []
    assert len(marked(job)) == 3
    # Asked again it does not even launch an attempt, and says why.
    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 1, job.output()
    summary = job.status()["summary"]
    assert (summary["status"], summary["cause"]) == ("failed", "bad-checkpoint")
    assert "no checkpoint of pretrain to go on from is whole" in summary["message"]
    assert job.attempts("pretrain") == [1, 2]


# --- full disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_saving(reference: Job, job: Job) -> None:
    """No room for a shard, though for small files: a limit on the size of files, which needs no root."""
    dinoctl = job.start(job.submit())
    moment = hold(job, "pretrain")
    largest = max(file.stat().st_size for file in (job.run_dir / "checkpoints").rglob("*.safetensors"))
    # As the disk would fill up under a live job: dinoctl's own limit is left alone, as it saves nothing large.
    for pid in moment.ranks:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest - 1, largest - 1))
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 3, job.output()

    view = job.status()
    assert (view["summary"]["status"], view["summary"]["cause"]) == ("failed", "disk-full")
    assert view["runbook"] == "runbooks/disk-full.md"
    assert "publishing" in view["summary"]["message"]
    assert [step for step, _ in job.sealed("pretrain")] == [moment.sealed]
    half_written = [f.name for f in (job.run_dir / "checkpoints/pretrain/1").iterdir()]
    assert half_written == [str(moment.sealed)]
    job.no_process_is_left()

    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 0, job.output()
    assert job.steps(2)[0] == moment.sealed + 1
    same_weights(job, reference, ONE)


@pytest.fixture
def small_disk(job: Job) -> Iterator[Path]:
    """The runs on a file system of their own, of 24 MB."""
    job.runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(job.runs)], check=True)
    try:
        yield job.runs
    finally:
        subprocess.run(["umount", "--lazy", str(job.runs)], check=True)


def fill(file: Path) -> None:
    """Take what is left of the file system."""
    with file.open("wb", buffering=0) as out, suppress(OSError):
        while out.write(bytes(4096)):
            pass
    assert shutil.disk_usage(file.parent).free == 0


@pytest.mark.requires("mount")
def test_a_disk_without_a_single_free_byte(reference: Job, job: Job, small_disk: Path) -> None:
    """Not even the log can be written: dinoctl gives up by itself, and nothing that was sealed is lost."""
    dinoctl = job.start(job.submit())
    moment = hold(job, "pretrain")
    filler = small_disk / "filler"
    fill(filler)
    moment.let_go()
    assert dinoctl.wait(PATIENCE) == 3, job.output()
    assert "No space left" in job.output()
    assert [step for step, _ in job.sealed("pretrain")] == [moment.sealed]
    job.no_process_is_left()

    filler.unlink()
    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 0, job.output()
    assert job.end(1)["cause"] == "disk-full"
    following = job.attempts("pretrain")[-1]
    assert job.steps(following)[0] == moment.sealed + 1
    same_weights(job, reference, ONE)


# --- images -----------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_skipped_counted_and_named(job: Job, make_job: MakeJob, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(job.images, images)
    torn = images / "circles" / "torn.png"
    whole = (images / "circles" / "000.png").read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    (images / "squares" / "empty.png").touch()
    (images / "squares" / "text.jpg").write_text("not an image")
    few, refused = (make_job(images=images, file=job.file, name=name) for name in ("few", "refused"))

    # 3 of 63 are more than data.max_skip_rate allows by itself.
    assert refused.start(refused.submit("phases.pretrain.steps=2")).wait(PATIENCE) == 1, refused.output()
    summary = refused.status()["summary"]
    assert summary["cause"] == "bad-data"
    assert "3 of 63 images" in summary["message"]

    done = few.start(few.submit("data.max_skip_rate=0.1", "phases.pretrain.steps=2")).wait(PATIENCE)
    assert done == 0, few.output()
    index = next((few.run_dir / "data").glob("index-*.json")).read_bytes()
    skipped = {one["path"] for one in json.loads(index)["skipped"]}
    assert skipped == {"circles/torn.png", "squares/empty.png", "squares/text.jpg"}
    for name in skipped:
        assert name in few.output()
    assert "3 of 63 images are unreadable and left out" in few.output()


# --- a newer dinoctl --------------------------------------------------------------------------------------------------


def test_a_run_of_a_newer_dinoctl_is_left_alone(reference: Job, make_job: MakeJob) -> None:
    job = make_job()
    shutil.copytree(reference.run_dir / contract.EVENTS_DIR, job.run_dir / contract.EVENTS_DIR)
    first = job.run_dir / contract.event_file(1)
    newer = {**json.loads(first.read_bytes()), "format": contract.FORMAT + 1, "version": "9.1.0", "mood": "good"}
    first.chmod(0o644)
    first.write_text(json.dumps(newer))
    for words in (job.submit(), *(job.on_the_run(command) for command in ("status", "resume", "cancel", "logs"))):
        refused = job.dinoctl(words)
        assert refused.returncode == 2, (words, refused.stdout)
        assert f"written by dinoctl 9.1.0 (format {contract.FORMAT + 1})" in refused.stdout
        assert "Use dinoctl 9.1.0 or newer" in refused.stdout
        assert "Traceback" not in refused.stdout
