"""Tar shards on a real S3 store: the same as in a folder, whatever the store does meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import storage
from model.data import patience
from model.data.__main__ import main
from model.data.batch import Batch
from tests.jobs.harness import wait_until
from tests.model.data import loading
from tests.model.data.loading import assert_equal
from tests.stores.proxy import Fault, Proxy, every, proxied
from tests.stores.weed import Store

pytestmark = [pytest.mark.jobs, pytest.mark.requires("s3")]


@pytest.fixture
def packed(images: Path, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The images of conftest in three shards, in a folder and on the bucket: their patterns."""
    patterns = []
    for target in (str(tmp_path / "tars"), f"{s3}/tars"):
        assert main(["pack", str(images), target, "--images-per-shard", "16"]) == 0
        patterns.append(f"{target}/images-{{000000..000002}}.tar")
        assert capsys.readouterr().out.endswith(f"data.path: {patterns[-1]}\n")
    return patterns[0], patterns[1]


def settings(path: str) -> dict[str, object]:
    return {"path": path, "lanes": 3, "window": 4, "workers": 2}


def test_a_bucket_gives_the_same_batches_as_a_folder(packed: tuple[str, str], tmp_path: Path) -> None:
    folder, bucket = packed
    there = loading.batches(settings(folder), tmp_path / "folder", clocks=(0, 12))
    assert_equal(there, loading.batches(settings(bucket), tmp_path / "bucket", clocks=(0, 12)))
    globbed = bucket.replace("{000000..000002}", "*")
    assert_equal(there, loading.batches(settings(globbed), tmp_path / "glob", clocks=(0, 12)))


def test_pack_index_check_and_stats(
    packed: tuple[str, str], images: Path, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = packed[1]
    for number in range(3):
        name = f"images-{number:06d}.tar"
        size = (tmp_path / "tars" / name).stat().st_size
        assert storage.read_range(f"{s3}/tars/{name}", 0, size + 1) == (tmp_path / "tars" / name).read_bytes()
    assert storage.read_range(f"{s3}/tars/classes.txt", 0, 100) == b"a\nb\n"
    assert main(["pack", str(images), f"{s3}/tars"]) == 2
    assert f"{s3}/tars/images-000000.tar is there already" in capsys.readouterr().err
    assert main(["pack", str(images / "a"), f"{s3}/tars", "--name", "flat"]) == 0  # no folders, so no classes
    assert main(["pack", str(images.parent), f"{s3}/tars", "--name", "other"]) == 2
    assert f"{s3}/tars/classes.txt holds other classes" in capsys.readouterr().err
    assert main(["index", bucket, "--to", str(tmp_path / "index")]) == 0
    assert "40 images in 3 shards" in capsys.readouterr().out
    assert main(["check", bucket, "--index", str(tmp_path / "index")]) == 0
    assert "40 images of 3 tar shards" in capsys.readouterr().out
    rewritten = tmp_path / "tars/images-000001.tar"  # as long as the other, which a bucket says nothing of
    size = (tmp_path / "tars/images-000000.tar").stat().st_size
    assert rewritten.stat().st_size == size
    time.sleep(1.1)  # a bucket counts in seconds
    storage.replace(f"{s3}/tars/images-000000.tar", rewritten.read_bytes())
    assert main(["check", bucket, "--index", str(tmp_path / "index")]) == 1
    assert "its shard was rewritten; `dinoctl data index` again" in capsys.readouterr().out
    assert main(["index", bucket, "--to", str(tmp_path / "index")]) == 0
    assert main(["check", bucket, "--index", str(tmp_path / "index")]) == 0
    storage.replace(f"{s3}/tars/images-000000.tar", (tmp_path / "tars/images-000000.tar").read_bytes())
    capsys.readouterr()
    told = []
    for pattern in packed:
        assert main(["stats", pattern, "--json"]) == 0
        told.append({**json.loads(capsys.readouterr().out), "of": ""})
    assert told[0] == told[1]


def test_what_is_not_there_and_who_may_not_read(
    packed: tuple[str, str], s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{s3}/tars/images-000007.tar"]) == 2
    assert "no such tar shard: s3://" in capsys.readouterr().err
    assert main(["check", f"{s3}/nothing/*.tar"]) == 2
    assert "no tar shard matches s3://" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    assert main(["check", packed[1]]) == 1  # at once: asking again does not help
    assert "s3://" in capsys.readouterr().err


def forget_clients() -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(s3: str, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What this process takes for the store."""
    with proxied(s3_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_clients()
        yield proxy
    forget_clients()


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.RESET, Fault.CUT])
def test_a_rude_store_changes_no_batch(packed: tuple[str, str], tmp_path: Path, proxy: Proxy, fault: Fault) -> None:
    folder, bucket = packed
    proxy.fault = every(3, fault)
    there = loading.batches(settings(folder), tmp_path / "folder")
    assert_equal(there, loading.batches(settings(bucket), tmp_path / "bucket"))
    assert proxy.faults[fault] > 3


def test_a_silent_store_is_asked_again(
    packed: tuple[str, str], tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bucket = packed
    monkeypatch.setitem(storage.S3_OPTIONS["config_kwargs"], "read_timeout", 1)
    proxy.fault = every(17, Fault.SILENCE)
    there = loading.batches(settings(folder), tmp_path / "folder")
    assert_equal(there, loading.batches(settings(bucket), tmp_path / "bucket"))
    assert proxy.faults[Fault.SILENCE] >= 1


def test_a_store_that_is_killed_and_comes_back_is_no_skip(
    packed: tuple[str, str],
    tmp_path: Path,
    s3_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, bucket = packed
    whole = loading.batches(settings(folder), tmp_path / "folder", clocks=(0, 30))
    loader = loading.loader(settings(bucket), tmp_path / "bucket", clocks=(0, 30))
    monkeypatch.setattr(patience, "WAITS", (0.5,) * 200)
    loader._budget = 4000  # else all of these small images are read before the store dies
    seen: list[Batch] = []
    reading = threading.Thread(target=lambda: [(seen.append(batch), time.sleep(0.05)) for batch in loader])
    reading.start()
    wait_until(lambda: len(seen) > 5, "the first batches")
    s3_store.kill()
    time.sleep(2)
    at = len(seen)
    s3_store.start()  # by the main thread: the store ends with the thread that started it
    reading.join()
    assert at < 30
    assert_equal(whole, seen)
    assert loader.skipped.count == 0
    assert "Could not connect" in caplog.text
    assert "again in 0.5 s" in caplog.text
