"""Whole runs in a bucket of a real S3 store, killed, rude or silent; taken up elsewhere with nothing but the URI.

They end with the weights of a run on a disk that nobody disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml

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


# --- attempts that the store, or somebody, takes for dead -------------------------------------------------------------


def altered(job: Job, folder: Path, *lines: str) -> Job:
    """The same job, whose dinoctl and agents begin with these lines of Python: constants that a test shortens. Ranks
    run the run's own copy of the code, and are not altered."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return replace(job, environment={**job.environment, "PYTHONPATH": str(folder)})


def test_a_store_that_is_away_for_longer_than_an_attempt_waits(
    job: Job, undisturbed: Job, tmp_path: Path, s3_store: Store
) -> None:
    """The agent gives up, and cannot even say so; whoever watches goes on once the store is back."""
    short = "link.OUT_OF_REACH_SECONDS, s3.PATIENCE.seconds = 5.0, 2.0"
    impatient = altered(job, tmp_path / "site", "from model import link, s3", short)
    dinoctl = impatient.start(impatient.submit())
    moment = hold(job, "pretrain")
    agent = job.agent(1)
    s3_store.kill()
    moment.let_go()
    try:
        wait_until(lambda: is_gone(agent), "the agent to give up")
    finally:
        s3_store.start()
    assert dinoctl.wait(PATIENCE) == 0, job.output()
    assert job.end(1)["cause"] in ("store-lost", "vanished")
    went_on_exactly(job, "pretrain", moment)
    each_phase_ran_once(job, PHASES)
    same_weights(job, undisturbed, PHASES)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_zombie_that_goes_on_sealing_and_pruning_beside_its_successor(
    job: Job, undisturbed: Job, tmp_path: Path
) -> None:
    """Its machine was suspended, another one took over, and it looked at `closed.json` just before that was there."""
    dinoctl = job.start(job.submit())
    moment = hold(job, "pretrain")
    dinoctl.kill()
    dinoctl.wait(PATIENCE)
    zombie = [one for one in job.processes() if one.pid not in moment.ranks]
    for process in zombie:
        process.suspend()
    another = altered(
        elsewhere(job, tmp_path / "elsewhere"), tmp_path / "site",
        "from model import contract", "contract.hostname = lambda: 'elsewhere'",
        "from orchestrator.launchers import local", "local.SILENT_SECONDS = 2.0",
    )  # fmt: skip
    resumed = another.start(["resume", job.where])
    wait_until(lambda: job.attempts("pretrain") == [1, 2] and job.steps(2), "the successor to train")
    storage.remove(f"{job.where}/{contract.closed_file(1)}")
    for process in zombie:
        process.resume()
    moment.let_go()
    wait_until(lambda: is_gone(job.agent(1)), "the zombie to end")
    assert resumed.wait(PATIENCE) == 0, another.output()
    assert (job.steps(1)[-1], job.end(1)["steps"]) == (20, [moment.sealed]), "it trained to the end, and nothing counts"
    assert job.steps(2)[0] == moment.sealed + 1
    each_phase_ran_once(job, PHASES)
    same_weights(job, undisturbed, PHASES)


def test_a_phase_that_begins_from_copies(make_job: Callable[..., Job], undisturbed: Job, tmp_path: Path) -> None:
    """Of one that it goes on from, and of the part that is left of the one with its Gram teacher."""
    made = [
        undisturbed.dinoctl(["ckpt", "copy", f"{undisturbed.name}#pretrain@{step}", str(tmp_path / "copy")])
        for step in ("final", "6")
    ]
    assert [one.returncode for one in made] == [0, 0], made
    final, sixth = (one.stdout.splitlines()[0] for one in made)
    assert storage.names(sixth) == ["manifest.json", "teacher_backbone.safetensors"]
    file = part_of_tiny(tmp_path / "gram.yaml", ["gram"])
    spec = yaml.safe_load(file.read_text())
    spec["phases"]["gram"] |= {"init": final, "gram_teacher": sixth}
    file.write_text(yaml.safe_dump(spec, sort_keys=False))
    job = make_job(file=file, name="copied")
    assert job.start(job.submit()).wait(PATIENCE) == 0, job.output()
    assert job.attempt(1).inputs["init"].path == final
    same_weights(job, undisturbed, ("gram",))
