"""Who keeps a run on a cluster going with no process of ours left: the job after an attempt, and the controller's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.contract import Attempt
from orchestrator.launchers import slurm_control
from tests.jobs.harness import PATIENCE, Job, draw_images, part_of_tiny
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.requires("slurm"), pytest.mark.jobs]

PROFILE = """\
name: dev
launcher: slurm
slurm: {partition: low, gpus: false, notice_seconds: 20, poll_seconds: 1}
"""


@pytest.fixture
def job(tmp_path: Path, slurm: Cluster) -> Job:
    """A run of one phase; its jobs end with the fixture `slurm`."""
    images = tmp_path / "images"
    draw_images(images)
    (tmp_path / "dev.yaml").write_text(PROFILE)
    part_of_tiny(tmp_path / "job.yaml", ("pretrain",), cluster=str(tmp_path / "dev.yaml"))
    return Job(tmp_path, images, file=tmp_path / "job.yaml")


def submit_and_leave(job: Job, *words: str) -> None:
    """Submit with a process in the background, and kill that once the attempt has a job: nobody of ours is left."""
    said = job.dinoctl(job.submit("--detach", *words))
    assert said.returncode == 0, said.stdout
    try:
        wait(lambda: bool(job.events("AttemptLaunched")), "the first attempt to be launched")
    finally:
        (line,) = [line for line in said.stdout.splitlines() if line.startswith("watched by process ")]
        os.kill(int(line.split()[3]), signal.SIGKILL)


def wait(is_so: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def sealed(job: Job, attempt: int = 1) -> bool:
    return any((job.run_dir / "checkpoints" / "pretrain" / str(attempt)).glob("*/manifest.json"))


def jobs(slurm: Cluster, kind: str, states: str = "PENDING,RUNNING") -> list[str]:
    """Ids of the small jobs that are there, oldest first."""
    text = slurm.run("squeue", "-h", "-t", states, "-S", "i", "-o", "%i|%j")
    return [line.split("|")[0] for line in text.splitlines() if line.endswith(f"-{kind}")]


@pytest.mark.parametrize("how", ["killed with its agent", "its node lost"])
def test_a_run_goes_on_with_no_process_of_ours(slurm: Cluster, job: Job, how: str) -> None:
    submit_and_leave(job, "phases.pretrain.steps=24")
    (launched,) = job.events("AttemptLaunched")
    assert jobs(slurm, "end") == [launched["handle"]["end_job"]]
    wait(lambda: sealed(job), "a checkpoint")
    attempt = str(launched["handle"]["job"])
    if how == "killed with its agent":
        slurm.run("scancel", "--signal=KILL", f"{attempt}.0")  # the step: a job is sent TERM first
    else:
        slurm.kill_node(slurm.run("squeue", "-h", "-j", attempt, "-o", "%N").strip())
    wait(lambda: len(job.events("AttemptEnded")) == 2, "the second attempt to end", 2 * PATIENCE)
    first, second = job.events("AttemptEnded")
    assert (first["cause"], second["cause"]) == ("vanished", "done")
    assert job.status()["summary"]["status"] == "done"
    wait(lambda: jobs(slurm, "end") == [], "no job after an attempt to be left")


def test_small_jobs_do_not_pile_up(slurm: Cluster, tmp_path: Path) -> None:
    attempts = [_attempt(tmp_path, number) for number in (1, 2)]
    busy = [slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600").strip() for _ in attempts]
    handles = [slurm_control.cover_end(one, {"partition": "low"}, id_) for one, id_ in zip(attempts, busy, strict=True)]
    assert jobs(slurm, "end") == [handles[1]["end_job"]]
    refused = slurm_control.cover_end(attempts[1], {"partition": "nowhere"}, busy[1])
    assert "invalid partition specified: nowhere" in refused["end_job_refused"]
    assert slurm_control.cover_end(attempts[1], {"end_job": False}, busy[1]) == {}


def _attempt(folder: Path, number: int) -> Attempt:
    return Attempt(
        format=1, run="tiny", run_id="ab" * 16, run_dir=str(folder), attempt=number, phase="pretrain",
        launch_name=f"tiny-abababab-pretrain-{number}", seed=0, model={}, settings={}, inputs={}, resume=[],
        keep_steps=[], nodes=1, processes_per_node=1, threads=1, code_dir="", on_end=[], spec_digest="", code_digest="",
    )  # fmt: skip


def test_the_controller_renews_itself_and_leaves_when_the_run_is_over(slurm: Cluster, job: Job) -> None:
    words = ["phases.pretrain.steps=100000", "controller.on=cluster", "controller.time_limit_minutes=1"]
    said = job.dinoctl(job.submit("--detach", *words))
    assert said.returncode == 0, said.stdout
    wait(lambda: len(jobs(slurm, "controller")) == 2, "one controller, and one behind it")
    first, second = jobs(slurm, "controller")
    assert f"to be watched by job {first} (" in said.stdout
    again = job.dinoctl(job.submit("--detach", *words))
    assert any(f"watched by job {one} (" in again.stdout for one in (first, second))
    assert len(jobs(slurm, "controller")) <= 2  # one a minute, and a slow machine may be at the second by now
    wait(lambda: job.status()["summary"]["watch"]["job"] == f"job {second}", "the second one to watch", 2 * PATIENCE)
    wait(lambda: len(jobs(slurm, "controller")) == 2, "one behind the second")
    assert len(job.events("AttemptLaunched")) == 1  # the attempt does not notice
    job.dinoctl(job.on_the_run("cancel"))
    wait(lambda: jobs(slurm, "controller") == [], "no controller to be left")
    assert job.status()["summary"]["status"] == "cancelled"
    assert not (job.run_dir / "controller.json").exists()


def test_a_controller_that_is_killed_is_followed_by_the_one_behind_it(slurm: Cluster, job: Job) -> None:
    said = job.dinoctl(job.submit("--detach", "phases.pretrain.steps=100000", "controller.on=cluster"))
    assert said.returncode == 0, said.stdout
    wait(lambda: len(jobs(slurm, "controller")) == 2, "one controller, and one behind it")
    first, second = jobs(slurm, "controller")
    slurm.run("scancel", "--signal=KILL", "--full", first)
    wait(lambda: job.status()["summary"]["watch"]["job"] == f"job {second}", "the one behind it to watch")
    job.dinoctl(job.on_the_run("cancel"))
    wait(lambda: jobs(slurm, "controller") == [], "no controller to be left")
