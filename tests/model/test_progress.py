"""Progress chunks as the controller reads them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from model import parallel, storage
from model.progress import Progress
from orchestrator import progress as reader
from tests.model.test_checkpoint import make_attempt


def test_every_step_is_read_back(tmp_path: Path) -> None:
    progress = Progress(make_attempt(tmp_path, watch_seconds=0.0), 3)
    progress.note("from zero")
    for step in (1, 2, 3):
        progress.step(step, 10.0 * step, {"loss": 1.0 / step, "bad": math.nan})
        if step == 1:
            progress.note("skipped 1 image: a.png")
            progress.note("sealed 1")
    steps = reader.steps(str(tmp_path), 1)
    assert [(s.step, s.steps, s.images_per_second, s.metrics, s.note) for s in steps] == [
        (1, 3, 10.0, {"loss": 1.0}, "from zero"),
        (2, 3, 20.0, {"loss": 0.5}, "skipped 1 image: a.png; sealed 1"),
        (3, 3, 30.0, {"loss": 1.0 / 3}, ""),
    ]
    assert reader.chunks(str(tmp_path), 1) == [0, 1, 2]


def test_chunks_are_rare_unless_flushed(tmp_path: Path) -> None:
    progress = Progress(make_attempt(tmp_path, watch_seconds=60.0), 9)
    for step in (1, 2):
        progress.step(step, 1.0, {})
    assert reader.chunks(str(tmp_path), 1) == []
    progress.flush()
    progress.flush()
    assert reader.chunks(str(tmp_path), 1) == [0]
    assert len(reader.steps(str(tmp_path), 1)) == 2


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    progress = Progress(make_attempt(tmp_path, watch_seconds=0.0), 9)
    progress.note("hello")
    progress.step(1, 1.0, {})
    progress.flush()
    assert storage.names(str(tmp_path)) == []
