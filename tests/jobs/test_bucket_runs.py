"""Whole runs in a bucket of a real S3 store, killed, rude or silent; taken up elsewhere with nothing but the URI.

They end with the weights of a run on a disk that nobody disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from model import contract, storage
from tests.jobs.harness import (
    PATIENCE,
    ROOT,
    Job,
    cleaned_up,
    each_phase_ran_once,
    hold,
    kill_everything,
    part_of_tiny,
    same_weights,
    wait_until,
    went_on_exactly,
)
from tests.stores.proxy import Fault, proxied
from tests.stores.weed import Store

pytestmark = [pytest.mark.jobs, pytest.mark.requires("s3"), pytest.mark.timeout(1200)]

PHASES = ("pretrain", "gram")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return part_of_tiny(tmp_path_factory.mktemp("spec") / "two.yaml", PHASES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, file: Path, images: Path) -> Iterator[Job]:
    """On a disk."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), images, file, "undisturbed")
    with cleaned_up(job):
        assert job.start(job.submit()).wait(PATIENCE) == 0, job.output()
        yield job


@pytest.fixture
def job(make_job: Callable[..., Job], file: Path, s3: str) -> Job:
    return make_job(file=file, bucket=f"{s3}/runs")


def elsewhere(job: Job, folder: Path) -> Job:
    """The same run from a machine that knows nothing but its URI: another working directory, other temporary files."""
    (folder / "tmp").mkdir(parents=True)
    return replace(job, folder=folder, bucket="", environment={"TMPDIR": str(folder / "tmp")})


def test_killed_and_taken_up_elsewhere_by_its_uri(job: Job, undisturbed: Job, tmp_path: Path, s3_store: Store) -> None:
    dinoctl = job.start(job.submit())
    moment = hold(job, "pretrain")
    kill_everything(job, dinoctl)
    there = elsewhere(job, tmp_path / "elsewhere")
    resumed = there.start(["resume", job.where])
    wait_until(lambda: job.events("AttemptEnded"), "the first attempt to be closed")
    a_zombie_seals(job)
    assert resumed.wait(PATIENCE) == 0, there.output()
    assert there.dinoctl(["status", job.where]).stdout.startswith(f"{job.name}: done")
    assert "2 ranks" in there.dinoctl(["logs", job.where]).stdout
    assert "sealed 12" in there.dinoctl(["logs", job.where, "--rank", "0"]).stdout
    went_on_exactly(job, "pretrain", moment)
    each_phase_ran_once(job, PHASES)
    same_weights(job, undisturbed, PHASES)
    nowhere_is_a_secret(job, there, s3_store)


def a_zombie_seals(job: Job) -> None:
    """The ended attempt publishes, beside its successor, what would be the phase's last checkpoint."""
    late = msgspec.structs.replace(job.manifest("pretrain", 1, 6), step=20)
    storage.publish(f"{job.where}/{contract.manifest_file('pretrain', 1, 20)}", contract.encode(late))


def nowhere_is_a_secret(job: Job, there: Job, store: Store) -> None:
    """Neither in what a run keeps, its log and the logs of its processes among it, nor in what was printed."""
    kept = storage.contents(job.where)
    assert kept
    for data in (*kept.values(), job.output().encode(), there.output().encode()):
        assert store.secret.encode() not in data
        assert store.key.encode() not in data


def test_a_store_that_is_killed_in_the_middle_of_an_upload(job: Job, undisturbed: Job, s3_store: Store) -> None:
    """It is back after seconds, and the attempt has ridden it over."""
    with proxied(s3_store.endpoint, latency=0.1) as proxy:  # an upload takes long enough to be struck
        slow = replace(job, environment={"AWS_ENDPOINT_URL": proxy.endpoint})
        dinoctl = slow.start(slow.submit())
        step = f"{job.where}/{contract.checkpoint_dir('pretrain', 1, 6)}"
        wait_until(lambda: storage.names(step), "the first checkpoint to be on its way", pause=0.0)
        s3_store.kill()
        time.sleep(3)
        s3_store.start()
        proxy.latency = 0.0
        assert dinoctl.wait(PATIENCE) == 0, job.output()
    assert [job.attempts(phase) for phase in PHASES] == [[1], [2]]
    same_weights(job, undisturbed, PHASES)


def test_a_store_that_refuses_resets_and_is_silent(job: Job, undisturbed: Job, s3_store: Store) -> None:
    with proxied(s3_store.endpoint) as proxy:
        rude = replace(job, environment={"AWS_ENDPOINT_URL": proxy.endpoint})
        refusing = {0: Fault.UNAVAILABLE, 3: Fault.RESET, 7: Fault.CUT}
        proxy.fault = lambda request: refusing.get(request % 10)
        dinoctl = rude.start(rude.submit())
        wait_until(lambda: job.sealed("pretrain"), "a checkpoint")
        end = time.monotonic() + 30
        proxy.fault = lambda request: Fault.SILENCE if time.monotonic() < end else refusing.get(request % 10)
        assert dinoctl.wait(PATIENCE) == 0, job.output()
        assert min(proxy.faults[fault] for fault in Fault) > 0
    assert [job.attempts(phase) for phase in PHASES] == [[1], [2]]
    same_weights(job, undisturbed, PHASES)


def test_stopped_followed_and_resumed(job: Job, undisturbed: Job) -> None:
    shown = job.dinoctl(job.submit("--detach"))
    assert shown.returncode == 0, shown.stdout
    wait_until(lambda: job.sealed("pretrain"), "a checkpoint")
    assert job.dinoctl(job.on_the_run("cancel")).returncode == 0
    followed = job.dinoctl(job.on_the_run("logs", "--follow"))
    assert "asked to stop" in followed.stdout
    assert job.status()["summary"]["status"] == "cancelled"
    assert job.start(job.on_the_run("resume")).wait(PATIENCE) == 0, job.output()
    each_phase_ran_once(job, PHASES)
    same_weights(job, undisturbed, PHASES)


def test_wrong_credentials(job: Job) -> None:
    nobody = replace(job, environment={"AWS_SECRET_ACCESS_KEY": "wrong"})
    for words in (job.submit(), ["resume", job.where], ["status"], job.on_the_run("logs")):
        said = nobody.dinoctl(words)
        assert said.returncode == 2, said.stdout
        assert "AWS_PROFILE" in said.stdout
        assert "Traceback" not in said.stdout
    assert storage.names(job.bucket) == []


@pytest.mark.requires("stamps")
def test_the_job_of_ci_yaml(make_job: Callable[..., Job], s3: str) -> None:
    """Four phases on the demo's images and the table at the end, killed once and taken up again."""
    job = make_job(file=ROOT / "jobs" / "ci.yaml", name="ci", bucket=f"{s3}/runs")
    dinoctl = job.start(["submit", str(job.file)])
    hold(job, "gram", 10)
    kill_everything(job, dinoctl)
    assert job.start(["resume", job.where]).wait(2 * PATIENCE) == 0, job.output()
    each_phase_ran_once(job)
    assert {"report.json", "pca.png"} <= set(storage.names(f"{job.where}/report"))
