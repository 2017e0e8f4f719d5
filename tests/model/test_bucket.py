"""What `model.storage` promises, on a real S3 store: whole or not there, taken once, whatever the store does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import bucket, s3 as asking, storage
from orchestrator import store
from tests.stores.proxy import Fault, Proxy, every, proxied
from tests.stores.weed import Store

pytestmark = [pytest.mark.jobs, pytest.mark.requires("s3")]

LARGE = 5 * bucket.PART_BYTES + 12_345


@pytest.fixture
def proxy(s3: str, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What this process takes for the store."""
    with proxied(s3_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def pieces(seed: int) -> list[bytes]:
    """LARGE bytes, in pieces that no part's size divides."""
    one = bytes([seed]) + os.urandom(1_000_002)
    whole = one * (LARGE // len(one) + 1)
    return [whole[start : min(start + 3_333_333, LARGE)] for start in range(0, LARGE, 3_333_333)]


def test_published_read_listed_and_removed(s3: str) -> None:
    folder = f"{s3}/run"
    assert storage.names(folder) == []
    assert not storage.exists(f"{folder}/a")
    with pytest.raises(FileNotFoundError):
        storage.read(f"{folder}/a")
    storage.publish(f"{folder}/events/000001.json", b"one")
    storage.publish(f"{folder}/events/000001.json", b"one")  # one's own bytes: a retry that has succeeded
    with pytest.raises(storage.AlreadyPublished, match=r"events/000001\.json is there already"):
        storage.publish(f"{folder}/events/000001.json", b"two")
    storage.publish(f"{folder}/empty", b"")
    storage.replace(f"{folder}/events/000001.json", b"three")
    assert storage.read(f"{folder}/events/000001.json") == b"three"
    assert storage.read(f"{folder}/events/000001.json", 1) == b"hree"
    assert storage.read(f"{folder}/events/000001.json", 1, 2) == b"hr"
    assert storage.read(f"{folder}/events/000001.json", 5) == storage.read(f"{folder}/empty") == b""
    assert storage.names(folder) == ["empty", "events"]
    assert storage.contents(folder) == {"empty": b"", "events/000001.json": b"three"}
    storage.remove(f"{folder}/empty")
    storage.remove(f"{folder}/empty")
    storage.remove_tree(f"{folder}/events")
    storage.remove_tree(f"{folder}/events")
    assert storage.contents(folder) == {}  # SeaweedFS goes on listing the empty folder for a while


def test_large_files_in_parts(s3: str) -> None:
    path, mine, other = f"{s3}/large", pieces(1), pieces(2)
    storage.publish_pieces(path, mine)
    assert storage.read(path) == b"".join(mine)
    assert storage.read(path, 7, LARGE - 10) == b"".join(mine)[7 : LARGE - 3]
    storage.publish_pieces(path, map(memoryview, mine))
    with pytest.raises(storage.AlreadyPublished):
        storage.publish_pieces(path, other)
    with pytest.raises(storage.AlreadyPublished):
        storage.publish_pieces(path, other[:-1])
    assert storage.read(path) == b"".join(mine)


def test_of_many_writers_one_takes_the_name(s3: str) -> None:
    def take(number: int) -> bool:
        try:
            storage.publish(f"{s3}/name", str(number).encode())
        except storage.AlreadyPublished:
            return False
        return True

    with ThreadPoolExecutor(8) as writers:
        taken = list(writers.map(take, range(32)))
    assert taken.count(True) == 1
    assert storage.read(f"{s3}/name") == str(taken.index(True)).encode()


def test_many_at_once(s3: str, proxy: Proxy) -> None:
    files = {f"{s3}/{number:03d}": str(number).encode() for number in range(100)}
    storage.publish_many(files)
    proxy.latency = 0.2
    began = time.monotonic()
    assert storage.read_many(list(files)) == list(files.values())
    assert time.monotonic() - began < 10  # 20 s one after the other


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET, Fault.CUT])
def test_a_rude_store_is_asked_again(s3: str, proxy: Proxy, fault: Fault) -> None:
    """An answer that is cut may be one to a request that was carried out: it is refused the second time."""
    proxy.fault = every(3, fault)
    mine = pieces(3)
    storage.publish_pieces(f"{s3}/large", mine)
    for number in range(12):
        storage.publish(f"{s3}/{number}", b"x")
    assert storage.read(f"{s3}/large") == b"".join(mine)
    assert len(storage.names(s3)) == 13
    storage.remove_tree(s3)
    assert storage.contents(s3) == {}
    assert proxy.faults[fault] > 5


def test_silence_ends_with_another_try(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers nobody who asks in that time; a whole run sits 30 s of it out in test_bucket_runs."""
    end = time.monotonic() + 15
    proxy.fault = lambda request: Fault.SILENCE if time.monotonic() < end else None
    storage.publish(f"{s3}/a", b"x")
    assert storage.read(f"{s3}/a") == b"x"
    assert proxy.faults[Fault.SILENCE] >= 1


def test_patience_has_an_end(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.PATIENCE, "seconds", 3.0)
    proxy.fault = every(1, Fault.UNAVAILABLE)
    began = time.monotonic()
    with pytest.raises(storage.StoreError, match=rf"publishing {s3}/a: .*reduce your request rate.*; asked \d+ times"):
        storage.publish(f"{s3}/a", b"x")
    assert 1 < time.monotonic() - began < 10


def test_a_store_that_is_killed_during_an_upload(s3: str, s3_store: Store) -> None:
    """Nothing is visible before the last part is acknowledged, and the upload goes on once the store is back."""
    path, mine = f"{s3}/large", pieces(4)
    killed = threading.Event()

    def struck() -> Iterator[bytes]:
        for number, piece in enumerate(mine):
            if number == len(mine) // 2:
                s3_store.kill()
                killed.set()
            yield piece

    uploading = threading.Thread(target=storage.publish_pieces, args=(path, struck()))
    uploading.start()
    assert killed.wait(60)
    time.sleep(1)
    s3_store.start()  # by the main thread: the store ends with the thread that started it
    uploading.join()
    assert storage.read(path) == b"".join(mine)


def test_an_upload_that_is_broken_off_leaves_nothing(s3: str) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(5)[:-1]
        raise RuntimeError("the trainer dies")

    with pytest.raises(RuntimeError):
        storage.publish_pieces(f"{s3}/large", broken())
    assert not storage.exists(f"{s3}/large")
    assert storage.names(s3) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_PROFILE", "not-there")],
)
def test_who_may_not_is_told_at_once_and_how(
    s3: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    if name == "AWS_PROFILE":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    began = time.monotonic()
    for ask in (
        lambda: storage.publish(f"{s3}/a", b"x"),
        lambda: storage.read(f"{s3}/a"),
        lambda: storage.names(s3),
        lambda: storage.exists(f"{s3}/a"),
        lambda: storage.remove_tree(s3),
    ):
        with pytest.raises(storage.NoAccessError, match=f"{s3}.*AWS_PROFILE"):
            ask()
    assert time.monotonic() - began < 5
    assert "again in" not in caplog.text


def test_no_credentials_and_no_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by writing: SeaweedFS makes the bucket then.
    with pytest.raises(storage.NoAccessError, match="make the bucket no-such-bucket"):
        storage.names("s3://no-such-bucket/runs")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(storage.NoAccessError, match="AWS_ACCESS_KEY_ID"):
        storage.publish(f"{s3}/a", b"x")


def test_a_quota_is_a_full_disk(s3: str) -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": "QuotaExceeded"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    place = asking.Place.of(f"{s3}/a")
    full = asking._hopeless(ClientError(answer, "PutObject"), place, "publishing")
    assert isinstance(full, storage.DiskFullError)


def test_a_store_that_knows_no_conditions_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prove(f"{s3}/run")
    assert storage.names(f"{s3}/run") == []
    monkeypatch.setattr(
        bucket, "_create", lambda place, data: bucket.call(place, "publishing", "put_object", Body=data)
    )
    with pytest.raises(store.LogError, match="lets a second writer take a file's name"):
        store.prove(f"{s3}/run")


def test_a_forked_child_has_a_connection_of_its_own(s3: str) -> None:
    storage.publish(f"{s3}/a", b"x")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if storage.read(f"{s3}/a") == b"x" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_uri_at_which_no_run_can_lie() -> None:
    with pytest.raises(storage.StoreError, match="s3://BUCKET/PREFIX"):
        storage.publish("gs://bucket/run", b"x")
