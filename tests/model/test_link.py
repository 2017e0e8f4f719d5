"""An agent's link to its store, and the logs that it brings to a bucket, where a reader puts them together."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from model import config, contract, link, storage
from model.contract import Attempt, Cause
from model.link import Link, Logs
from model.progress import Progress
from model.watch import Watch, why_kill
from orchestrator import logs, progress
from tests.jobs.harness import wait_until
from tests.model.test_checkpoint import make_attempt


def test_an_attempt_out_of_reach_of_its_store_for_long_is_ended(tmp_path: Path) -> None:
    now = time.monotonic()
    watch, health = Watch(began=now), config.Health()
    lost = Link(make_attempt(tmp_path), Logs(make_attempt(tmp_path)), said="reading s3://b/x: 503", reached=now)
    assert why_kill(health, watch, 0, lost, now + link.OUT_OF_REACH_SECONDS - 1) is None
    end = why_kill(health, watch, 0, lost, now + link.OUT_OF_REACH_SECONDS + 1)
    assert end is not None
    assert end.cause is Cause.STORE_LOST
    assert end.message == "the run directory has not answered for 121 s: reading s3://b/x: 503"


def test_a_disk_that_does_not_answer_is_a_link_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hung(path: str) -> bool:
        time.sleep(0.05)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "exists", hung)
    monkeypatch.setattr(link, "OUT_OF_REACH_SECONDS", 0.2)
    opened = Link.open(make_attempt(tmp_path, watch_seconds=0.01))
    time.sleep(0.4)
    assert opened.out_of_reach(time.monotonic())
    assert "Input/output error" in opened.said
    opened.shut()


@pytest.fixture
def attempt(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """In a bucket; what is of this machine lies in the test's own folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return msgspec.structs.replace(make_attempt(tmp_path, watch_seconds=0.0), run_dir=f"{s3}/run")


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_logs_are_brought_in_chunks_and_read_as_one(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{attempt.run_dir}/{contract.rank_log(1, 0)}"
    file, shipping, reader = storage.local_file(path), Logs(attempt), logs.Reader(path)
    with pytest.raises(FileNotFoundError):
        logs.read(path)
    assert reader.new() == b""
    file.write_bytes(b"one\n")
    shipping.ship()
    shipping.ship()
    assert reader.new() == b"one\n"
    monkeypatch.setattr(link, "CHUNK_BYTES", 5)
    storage.publish(f"{path}/000001", b"tw")  # a try of ours that was given up, though it had arrived
    with file.open("ab") as more:
        more.write(b"two\nthree\n")
    shipping.ship()
    assert reader.new() == b"two\nthree\n"
    assert logs.read(path) == b"one\ntwo\nthree\n"
    assert storage.names(path) == ["000000", "000001", "000002", "000003"]
    shipping.forget()
    assert not file.exists()
    assert logs.read(path) == b"one\ntwo\nthree\n"


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_a_slow_bucket_holds_up_no_step(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one chunk is on its way steps are only noted; all have arrived after a flush, in their order."""
    real, answers = storage.publish, threading.Event()

    def slow(path: str, data: bytes) -> None:
        answers.wait(60)
        real(path, data)

    monkeypatch.setattr(storage, "publish", slow)
    written = Progress(attempt, 50)
    began = time.monotonic()
    for step in range(1, 51):
        written.step(step, 1.0, {})
    assert time.monotonic() - began < 5
    answers.set()
    written.flush()
    assert [one.step for one in progress.steps(attempt.run_dir, 1)] == list(range(1, 51))
    assert progress.chunks(attempt.run_dir, 1) == [0, 1]
    newest = progress.latest(attempt.run_dir, 1)
    assert newest is not None
    assert newest.step == 50


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_the_newest_chunk_is_found_without_a_listing(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "names", None)
    for count in range(10):
        assert progress.last_chunk(attempt.run_dir, 1) == count - 1
        storage.publish(f"{attempt.run_dir}/{contract.progress_chunk(1, count)}", b"")


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_a_chunk_that_a_bucket_refuses_is_told_at_the_next_step(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Progress(attempt, 50)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    written.step(1, 1.0, {})
    with pytest.raises(storage.NoAccessError, match="progress/000000"):
        written.flush()


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_the_claim_is_renewed_and_a_closed_attempt_is_noticed(attempt: Attempt) -> None:
    claim = f"{attempt.run_dir}/{contract.claim_file(1)}"
    storage.publish(claim, b"mine")
    claimed = storage.modified(claim)
    time.sleep(1.1)  # a bucket's clock shows seconds
    opened = Link.open(msgspec.structs.replace(attempt, watch_seconds=0.05))
    wait_until(lambda: storage.modified(claim) > claimed, "the claim to be renewed")
    assert storage.read(claim) == b"mine"
    storage.publish(f"{attempt.run_dir}/{contract.closed_file(1)}", b"{}")
    wait_until(lambda: opened.closed, "the end to be noticed")
    opened.shut()
