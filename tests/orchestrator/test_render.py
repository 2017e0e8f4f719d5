"""The tables that `status` draws: nothing that a person must know is cut off."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from model import contract, storage
from model.contract import Cause
from orchestrator import events, overview, render, status
from tests.orchestrator.written import Run

NOW = 1005.0


def text(drawn: RenderableType, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(drawn)
    return out.getvalue()


def test_the_table_of_runs(tmp_path: Path) -> None:
    live, lost, done = (Run(tmp_path / name) for name in ("live", "lost", "done"))
    live.launch(1, "pretrain")
    live.record(1, 0, {3: 1.0})
    live.watched()
    lost.watched(seen_at=1.0)
    done.done()
    lines = overview.runs([status.summary(run.path, NOW) for run in (live, lost, done)], NOW).splitlines()
    assert [word for word in lines[1].split() if word][:6] == ["live", "running", "pretrain", "(1", "of", "3)"]
    assert "3/6" in lines[1]
    assert "elsewhere/7 for 1 min" in lines[1]
    assert "nobody for 16 min" in lines[2]
    assert f"dinoctl resume {lost.path}" in lines[2]
    assert "done" in lines[3]
    assert "resume" not in lines[3]


def test_one_run_that_failed(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    for step in (2, 4):
        storage.publish(f"{run.path}/{contract.manifest_file('pretrain', 1, step)}", b"{}")
    run.end(1, Cause.CRASHED, [2, 4], "ValueError: wrong", detail="Traceback\nValueError: wrong")
    run.add(events.RunFailed, cause=Cause.CRASHED, message="ValueError: wrong. See runbooks/crashed.md")
    shown = text(render.detail(status.detail(run.path, NOW), NOW))
    for must in ("tiny: failed", run.path, "2, 4", "crashed: ValueError: wrong", "Traceback", "runbooks/crashed.md"):
        assert must in shown
    assert shown.rstrip().endswith(f"to go on: dinoctl resume {run.path}")


def test_the_first_look_at_the_images_until_there_is_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path / "looking")
    run.launch(1, "pretrain")
    run.looked(1, "looked at 4,000 of 9,000 images")
    words = "attempt 1, before its first step: looked at 4,000 of 9,000 images"
    assert words in text(render.detail(status.detail(run.path, NOW), NOW))
    run.record(1, 0, {1: 6.0})
    assert "looked at" not in text(render.detail(status.detail(run.path, NOW), NOW))


def test_brackets_in_a_message_are_text_and_no_markup(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.end(1, Cause.CRASHED, [], "list[red] of [/bold]", detail="x[0] [/]")
    shown = text(render.detail(status.detail(run.path, NOW), NOW))
    assert "list[red] of [/bold]" in shown
    assert "x[0] [/]" in shown


def test_many_attempts_and_checkpoints_are_cut(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    for attempt in range(1, 31):
        run.launch(attempt, "pretrain")
        run.end(attempt, Cause.STOPPED, [])
    shown = text(render.detail(status.detail(run.path, NOW), NOW))
    assert "the last 20 attempts; 10 before are in --json" in shown
    assert "1, 2, 3, 4, 5, 6, ..., 25, 26, 27, 28, 29, 30" in shown


def test_a_finished_run_shows_its_report(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.done()
    run.report()
    shown = text(render.detail(status.detail(run.path, NOW), NOW))
    assert "linear probe accuracy" in shown
    assert f"picture: {run.path}/report/pca.png" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600, "1 h 00 min"),
        (3600 * 26 + 300, "26 h 05 min"),
        (86400 * 3, "3 d 0 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert overview.duration(seconds) == words
