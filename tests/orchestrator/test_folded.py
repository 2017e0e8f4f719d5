"""The folded state beside a log: the same as a fold, and taken only for the very log that it was folded from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from model import storage
from model.contract import Cause, ContractError
from orchestrator import folded, state, store
from orchestrator.store import LogError
from tests.orchestrator.written import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.end(1, Cause.KILLED, [2], "rank 0 was killed")
    run.launch(2, "pretrain")
    return run


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many events each fold of a whole log took."""
    counted: list[int] = []
    fold = state.fold

    def counting(log: list[object]) -> object:
        counted.append(len(log))
        return fold(log)  # type: ignore[arg-type]

    monkeypatch.setattr(state, "fold", counting)
    return counted


def file(run: Run) -> Path:
    return Path(run.path) / folded.FILE


def test_it_is_the_fold_and_the_log_is_read_once(run: Run, folds: list[int]) -> None:
    by_hand = state.fold(store.read(run.path))
    folds.clear()
    assert [folded.load(run.path) for _ in range(3)] == [by_hand] * 3
    assert folds == [run.count]


def test_an_amended_spec_is_kept_beside_the_first(run: Run) -> None:
    from orchestrator.events import SpecAmended

    spec = {**folded.load(run.path).spec, "seed": 7}  # type: ignore[union-attr]
    run.add(SpecAmended, spec=spec, cluster={"launcher": "local", "name": "x"}, spec_digest="e" * 64, changed=["seed"])
    for _ in range(2):
        found = folded.load(run.path)
        assert found == state.fold(store.read(run.path))
        assert found is not None
        assert (found.spec["seed"], found.cluster["name"], found.created.spec["seed"]) == (7, "x", 0)


def test_a_new_event_makes_it_stale(run: Run, folds: list[int]) -> None:
    folded.load(run.path)
    run.end(2, Cause.DONE, [4, 6])
    found = folded.load(run.path)
    assert found is not None
    assert found.live is None
    assert folds == [run.count - 1, run.count]


def spoil_nothing_left(path: Path) -> None:
    path.write_bytes(b"")


def spoil_torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def spoil_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def spoil_gone(path: Path) -> None:
    path.unlink()


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [spoil_nothing_left, spoil_torn, spoil_one_byte, spoil_gone, spoil_folder])
def test_whatever_happens_to_it_the_log_counts(run: Run, folds: list[int], spoil: Callable[[Path], None]) -> None:
    right = folded.load(run.path)
    spoil(file(run))
    assert folded.load(run.path) == right
    assert folds == [run.count] * 2


def test_another_run_under_the_same_name(run: Run, tmp_path: Path, folds: list[int]) -> None:
    folded.load(run.path)
    kept = file(run).read_bytes()
    os.rename(run.path, tmp_path / "before")
    other = Run(tmp_path / "tiny", created=5000.0)
    other.launch(1, "pretrain")
    other.end(1, Cause.KILLED, [4], "again")
    other.launch(2, "pretrain")
    file(other).write_bytes(kept)
    found = folded.load(other.path)
    assert found == state.fold(store.read(other.path))
    assert found is not None
    assert found.accepted() == {"pretrain": [(1, 4)]}


def test_a_log_that_was_put_back_and_went_another_way(run: Run) -> None:
    """The same first event and as many of them; the last is another."""
    folded.load(run.path)
    last = Path(run.path) / "events" / f"{run.count:06d}.json"
    was = last.read_bytes()
    last.unlink()
    last.write_bytes(was.replace(b'"handle":{"pid":1}', b'"handle":{"pid":2}').replace(b'"nonce":"', b'"nonce":"x'))
    found = folded.load(run.path)
    assert found is not None
    assert found.live is not None
    assert found.live.handle == {"pid": 2}


def test_what_another_version_folded_is_not_taken(run: Run, folds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folded, "_code", lambda: "another")
        folded.load(run.path)
    right = folded.load(run.path)
    assert folded.load(run.path) == right
    assert folds == [run.count] * 2


def test_a_store_without_room_costs_only_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, data: bytes) -> None:
        raise storage.DiskFullError(28, f"writing {path}: No space left on device")

    monkeypatch.setattr(storage, "replace", full)
    assert folded.load(run.path) == folded.load(run.path) == state.fold(store.read(run.path))


def test_a_damaged_log_is_told_even_where_its_state_was_folded(run: Run) -> None:
    folded.load(run.path)
    events = Path(run.path) / "events"
    (events / "000002.json").rename(events / "was")
    with pytest.raises(LogError, match=r"000002.json is missing"):
        folded.load(run.path)
    (events / "was").rename(events / "000002.json")
    (events / "000001.json").unlink()
    (events / "000001.json").write_text('{"event":')
    with pytest.raises((LogError, ContractError), match="torn"):
        folded.load(run.path)


def test_there_is_no_run(tmp_path: Path) -> None:
    assert folded.load(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []
