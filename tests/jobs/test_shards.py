"""Jobs on tar shards in mixed resolutions: struck, resumed with another number of loader threads, on one process and on
two, from a folder and from a bucket that dies meanwhile. They end with the weights of the run that nobody disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model import contract
from model.data.pack import pack
from tests.jobs.harness import (
    PATIENCE,
    Job,
    cleaned_up,
    hold,
    kill_everything,
    part_of_tiny,
    same_weights,
    went_on_exactly,
)
from tests.stores.weed import Store

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1800)]

PHASES = ("pretrain",)
MIXED = [{"global_size": 32, "local_size": 16, "ratio": 0.5}, {"global_size": 48, "local_size": 24, "ratio": 0.5}]
PER_SHARD = 7


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"path": "shards", "hold_out": "none", "workers": 0, "lanes": 5, "window": 4}
    crops = {"resolutions": MIXED, "local_count": 2}
    return part_of_tiny(tmp_path_factory.mktemp("spec") / "shards.yaml", PHASES, data=data, crops=crops)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A pattern."""
    target = str(tmp_path_factory.mktemp("shards"))
    return Path(pack(str(images), target, "x", PER_SHARD, 0, lambda done, total: None).pattern)


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, file: Path, shards: Path
) -> Iterator[tuple[Job, str]]:
    """A run without loader threads that nobody disturbed, and the override that says its number of processes."""
    processes = f"resources.processes_per_node={request.param}"
    job = Job(tmp_path_factory.mktemp("undisturbed"), shards, file, "undisturbed")
    with cleaned_up(job):
        assert job.start(job.submit(processes)).wait(PATIENCE) == 0, job.output()
        yield job, processes


def test_killed_with_three_loader_threads_and_resumed_with_none(
    undisturbed: tuple[Job, str], make_job: Callable[..., Job], file: Path, shards: Path
) -> None:
    reference, processes = undisturbed
    job = make_job(images=shards, file=file)
    dinoctl = job.start(job.submit(processes, "data.workers=3"))
    moment = hold(job, "pretrain", ranks=int(processes[-1]))
    kill_everything(job, dinoctl)
    assert job.start(job.submit(processes, "data.workers=0", "--amend")).wait(PATIENCE) == 0, job.output()
    went_on_exactly(job, "pretrain", moment)
    same_weights(job, reference, PHASES)


@pytest.mark.requires("s3")
def test_a_bucket_that_is_killed_and_comes_back(
    undisturbed: tuple[Job, str], make_job: Callable[..., Job], file: Path, images: Path, s3: str, s3_store: Store
) -> None:
    reference, processes = undisturbed
    packed = pack(str(images), s3, "x", PER_SHARD, 0, lambda done, total: None)
    job = make_job(images=packed.pattern, file=file)
    dinoctl = job.start(job.submit(processes, "data.workers=1", "data.read_ahead_mib=1"))
    moment = hold(job, "pretrain", between=False, ranks=int(processes[-1]))
    s3_store.kill()
    moment.let_go()
    time.sleep(1)
    s3_store.start()
    assert dinoctl.wait(PATIENCE) == 0, job.output()
    assert job.attempts("pretrain") == [1]
    logs = [job.log(1, rank) for rank in range(int(processes[-1]))]
    assert any("Could not connect" in log and "again in" in log for log in logs)
    assert "unreadable" not in job.output()
    same_weights(job, reference, PHASES)


def test_a_text_phase_reads_its_captions_from_shards(
    make_job: Callable[..., Job], shards: Path, tmp_path: Path
) -> None:
    file = part_of_tiny(tmp_path / "text.yaml", ("pretrain", "text"))
    job = make_job(images=shards, file=file)
    few = ["phases.pretrain.steps=3", "phases.text.steps=3", "phases.text.vision_tower=pretrain@final"]
    assert job.start(job.submit(*few)).wait(PATIENCE) == 0, job.output()
    assert job.steps(job.attempts("text")[-1]) == [1, 2, 3]
    (tokenizer,) = (job.run_dir / "data").glob("tokenizer-*.json")
    step, attempt = job.sealed("text")[-1]
    path = job.run_dir / contract.manifest_file("text", attempt, step)
    manifest = contract.read_manifest(path.read_bytes(), (), str(path))
    assert manifest.model["tokenizer"] == tokenizer.read_text()
