"""The event log on a real file system: exclusive numbers, gaps, formats, heartbeats, and stores that are not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from model import storage
from model.contract import Cause, Watcher, boot_id, event_file, hostname
from orchestrator import store
from orchestrator.events import AttemptLaunched, Event, RunCreated, RunFailed, encode


def created(format: int = 1) -> RunCreated:
    return RunCreated(
        at=1.0, nonce="a", format=format, run="r", run_id="0" * 32, spec={"phases": {}}, cluster={},
        spec_digest="s", code_digest="c", version="9.9.9",
    )  # fmt: skip


def launched(number: int, nonce: str = "n") -> Event:
    return AttemptLaunched(at=2.0, nonce=nonce, attempt=number, handle={"pid": number})


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    run = str(tmp_path / 'it\'s a "run"\n; $HOME')
    log = [created(), launched(1), launched(2)]
    for number, event in enumerate(log, 1):
        store.append(run, number, event)
    assert store.read(run) == log


def test_no_run_is_no_events(tmp_path: Path) -> None:
    assert store.read(str(tmp_path / "none")) == []


def test_a_taken_number_is_a_conflict_but_ones_own_event_is_not(tmp_path: Path) -> None:
    run = str(tmp_path)
    store.append(run, 1, created())
    store.append(run, 2, launched(1))
    store.append(run, 2, launched(1))  # a retry after a lost answer
    with pytest.raises(store.Conflict):
        store.append(run, 2, launched(1, nonce="other"))
    assert store.read(run) == [created(), launched(1)]


def test_a_gap_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LIST_AGAIN", (0.001,))
    run = str(tmp_path)
    store.append(run, 1, created())
    store.append(run, 3, launched(1))
    with pytest.raises(store.LogError, match=r"events/000002.json is missing"):
        store.read(run)


def test_a_gap_that_closes_is_waited_for(tmp_path: Path) -> None:
    run = str(tmp_path)
    store.append(run, 1, created())
    store.append(run, 3, launched(2))
    late = threading.Timer(0.1, store.append, (run, 2, launched(1)))
    late.start()
    try:
        assert len(store.read(run)) == 3
    finally:
        late.join()


def test_half_written_and_foreign_files_are_not_events(tmp_path: Path) -> None:
    run = str(tmp_path)
    store.append(run, 1, created())
    (tmp_path / "events" / ".000002.json.abc.tmp").write_text("{")
    (tmp_path / "events" / "000002.json~").write_text("{")
    assert store.read(run) == [created()]


def test_a_newer_format_is_refused_and_says_who_wrote_it(tmp_path: Path) -> None:
    newer = json.loads(encode(created(format=7))) | {"a_field_of_the_future": 1}
    storage.publish(f"{tmp_path}/{event_file(1)}", json.dumps(newer).encode())
    with pytest.raises(store.LogError, match=r"written by dinoctl 9\.9\.9 \(format 7\)"):
        store.read(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "torn: 0 bytes are no whole event"),
        (b"[]", "not the first event of a run"),
        (
            b'{"event": "RunCreated"',
            r"torn: 22 bytes are no whole event \(Input data was truncated\); the log is damaged",
        ),
    ],
)
def test_a_torn_first_event_is_an_error(tmp_path: Path, data: bytes, why: str) -> None:
    storage.publish(f"{tmp_path}/{event_file(1)}", data)
    with pytest.raises(store.LogError, match=f"000001.json: {why}"):
        store.read(str(tmp_path))


def test_prove_accepts_a_real_file_system_and_leaves_nothing(tmp_path: Path) -> None:
    store.prove(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_prove_refuses_a_store_that_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "publish", storage.replace)
    with pytest.raises(store.LogError, match="lets a second writer take"):
        store.prove(str(tmp_path))


def watcher(seen_at: float, every: float = 1.0, pid: int | None = None, host: str | None = None) -> Watcher:
    pid = pid or os.getpid()
    return Watcher(
        host=host or hostname(), boot_id=boot_id(), pid=pid, started=psutil.Process(os.getpid()).create_time(),
        command="dinoctl submit", seen_at=seen_at, every=every,
    )  # fmt: skip


def test_a_watcher_is_alive_while_it_looks_and_its_process_is_there() -> None:
    assert store.is_alive(watcher(100.0), 102.0)
    assert not store.is_alive(watcher(100.0), 200.0), "silent for long"
    assert not store.is_alive(watcher(100.0, every=0.0), 100.0), "looked once"
    assert not store.is_alive(watcher(100.0, pid=2**22 + 1), 101.0), "its process is gone"
    assert store.is_alive(watcher(100.0, pid=2**22 + 1, host="elsewhere"), 101.0), "cannot be seen from here"


def test_a_heartbeat_replaces_those_of_the_gone(tmp_path: Path) -> None:
    run = str(tmp_path)
    store.heartbeat(run, watcher(50.0, pid=2**22 + 1))
    store.heartbeat(run, watcher(99.0, host="elsewhere"))
    store.heartbeat(run, watcher(100.0))
    assert [(w.host, w.seen_at) for w in store.watchers(run)] == [(hostname(), 100.0), ("elsewhere", 99.0)]


def test_a_torn_heartbeat_is_told_and_hinders_nobody(tmp_path: Path) -> None:
    run = str(tmp_path)
    store.heartbeat(run, watcher(99.0, host="elsewhere"))
    (tmp_path / "watchers" / "torn.json").write_bytes(b'{"host":"far')
    assert [w.host for w in store.watchers(run)] == ["elsewhere"]
    (said,) = store.unreadable_watchers(run)
    assert f"{run}/watchers/torn.json: not a Watcher" in said
    store.heartbeat(run, watcher(100.0))
    assert store.unreadable_watchers(run) == []
    assert [w.host for w in store.watchers(run)] == [hostname(), "elsewhere"]


def test_reading_a_log_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, orchestrator.store; print({'torch', 'pydantic', 'mlflow', 'numpy', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_failed_event_round_trips(tmp_path: Path) -> None:
    store.append(str(tmp_path), 1, created())
    store.append(str(tmp_path), 2, RunFailed(at=3.0, nonce="x", cause=Cause.HUNG, message="no step"))
    assert isinstance(store.read(str(tmp_path))[1], RunFailed)
