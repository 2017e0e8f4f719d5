"""What a person who watches a run sees of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from model.contract import Cause
from orchestrator import control, screen as screens
from orchestrator.launchers.base import LaunchState, Observation
from orchestrator.screen import LEAST_BAR, SAME_LINE_SECONDS, Bars, Follower, Lines, View, line, screen
from tests.orchestrator.written import Run


def look(follower: Follower, run: Run) -> list[str]:
    return follower.look(control.load(run.path))


def test_it_follows_a_run_from_phase_to_phase(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    follower = Follower(run.path)
    follower.begin(control.load(run.path))
    assert look(follower, run) == []
    assert follower.view == View("pretrain", 1, 3, step=0, steps=6)

    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0}, note="sealed 2")
    assert look(follower, run) == ["pretrain: sealed 2"]
    assert follower.view == View("pretrain", 1, 3, 1, 2, 6, loss=5.0, images_per_second=21.0, eta=4.0)
    assert look(follower, run) == []

    run.end(1, Cause.KILLED, [2], "rank 1 was killed")
    assert look(follower, run) == ["attempt 1 of pretrain ended: killed: rank 1 was killed"]
    run.launch(2, "pretrain")
    run.record(2, 0, {3: 4.0})
    look(follower, run)
    assert follower.view == View("pretrain", 1, 3, 2, 3, 6, loss=4.0, images_per_second=22.0, eta=None)

    run.record(2, 1, {6: 1.0}, note="skipped 1 image: a/b.png")
    run.end(2, Cause.DONE, [4, 6], "every step is trained, 6 is sealed")
    assert look(follower, run) == [
        "pretrain: skipped 1 image: a/b.png", "pretrain: every step is trained, 6 is sealed",
    ]  # fmt: skip
    assert follower.view == View("gram", 2, 3, step=0, steps=4)


def test_who_comes_back_is_not_told_what_was(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {2: 5.0}, note="sealed 2")
    run.end(1, Cause.STOPPED, [2], "asked")
    follower = Follower(run.path)
    follower.begin(control.load(run.path))
    assert look(follower, run) == []
    assert follower.view == View("pretrain", 1, 3, step=2, steps=6)


def test_a_line_says_where_the_run_is() -> None:
    view = View("gram", 2, 5, 3, 120, 500, loss=1.23456, images_per_second=81.26, eta=200.0)
    assert line(view) == "phase gram (2 of 5), step 120/500, loss 1.2346, 81.3 images/s, ETA 3 min, attempt 3"
    assert line(View("gram", 2, 5, steps=500)) == "phase gram (2 of 5), step 0/500"


def test_lines_are_plain_and_not_too_many() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20)
    with screen(console) as shown:
        assert isinstance(shown, Lines)
        shown.show(View("pretrain", 1, 5, step=1, steps=500), 0.0)
        shown.show(View("pretrain", 1, 5, step=2, steps=500), 1.0)
        shown.note("sealed [2]")
        shown.show(View("pretrain", 1, 5, step=3, steps=500), 6.0)
        shown.show(View("pretrain", 1, 5, step=3, steps=500), 12.0)
        shown.show(View("pretrain", 1, 5, step=3, steps=500), 6.0 + SAME_LINE_SECONDS)
    third = "phase pretrain (1 of 5), step 3/500"
    assert out.getvalue().splitlines() == ["phase pretrain (1 of 5), step 1/500", "sealed [2]", third, third]


def test_a_terminal_has_a_bar_a_phase() -> None:
    out = io.StringIO()
    with screen(Console(file=out, force_terminal=True, width=120)) as shown:
        assert isinstance(shown, Bars)
        shown.show(View("pretrain", 1, 5, 1, 6, 6, loss=2.0, images_per_second=80.0, eta=0.0), 0.0)
        shown.show(View("gram", 2, 5, 2, 1, 4), 1.0)
        shown.note("sealed [2]")
    text = out.getvalue()
    for must in ("pretrain (1 of 5)", "gram (2 of 5)", "6/6", "loss 2.000", "80 images/s", "sealed [2]", "attempt 2"):
        assert must in text


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (110, "1234/7000  loss 7.200  106 images/s  ETA 2 h 05 min  attempt 2 0:00:00"),
        (80, "1234/7000  loss 7.200  106 images/s  ETA 2 h 05 min"),
        (60, "1234/7000  ETA 2 h 05 min"),
    ],
)
def test_figures_give_way_to_the_bar(width: int, figures: str) -> None:
    out = io.StringIO()
    with screen(Console(file=out, force_terminal=True, color_system=None, width=width)) as shown:
        shown.show(View("pretrain", 1, 5, 2, 3500, 7000, loss=7.2, images_per_second=106.0, eta=7500.0), 0.0)
        shown.show(View("pretrain", 1, 5, 2, 1234, 7000, loss=7.2, images_per_second=106.0, eta=7500.0), 0.0)
    last = next(line for line in reversed(out.getvalue().splitlines()) if "pretrain" in line)
    assert figures in last
    assert len(last.partition("pretrain (1 of 5) ")[2].partition(figures)[0]) >= LEAST_BAR


def test_the_first_look_at_the_images_until_there_is_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    follower = Follower(run.path)
    run.launch(1, "pretrain")
    seen = []
    for words in ("looked at 4,000 of 9,000 images", "looked at 9,000 of 9,000 images"):
        run.looked(1, words)
        look(follower, run)
        assert follower.view is not None
        seen.append(line(follower.view))
    assert seen == [
        "phase pretrain (1 of 3), step 0/6, looked at 4,000 of 9,000 images, attempt 1",
        "phase pretrain (1 of 3), step 0/6, looked at 9,000 of 9,000 images, attempt 1",
    ]
    run.record(1, 0, {1: 6.0})
    look(follower, run)
    assert follower.view.before == ""
    run.end(1, Cause.KILLED, [], "rank 1 was killed")
    run.launch(2, "pretrain")  # it reads the index that is there
    look(follower, run)
    assert follower.view.before == ""


# --- on a cluster -----------------------------------------------------------------------------------------------------


def test_the_queue_and_then_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screens, "now", lambda: 1000.0)
    run = Run(tmp_path / "tiny", launcher="slurm")
    follower = Follower(run.path)
    run.launch(1, "pretrain")
    state = control.load(run.path)
    waits = Observation(LaunchState.PENDING, detail="Resources", starts_at=1300.0)
    assert follower.look(state, waits) == []
    assert follower.view is not None
    assert line(follower.view) == (
        "phase pretrain (1 of 3), step 0/6, in the queue: Resources; expected to start in 5 min, attempt 1"
    )
    runs = Observation(LaunchState.RUNNING, nodes=("node1", "node2"))
    assert follower.look(state, runs) == ["attempt 1 runs on node1, node2"]
    assert follower.look(state, runs) == []
    assert follower.view.before == ""


@pytest.mark.parametrize("width", [60, 120])
def test_a_queue_that_is_too_long_for_the_terminal_is_cut(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, legacy_windows=False)
    with Bars(console) as bars:
        bars.show(View("pretrain", 1, 3, steps=6, before="in the queue: " + "ReqNodeNotAvail, " * 9), 0.0)
    text = out.getvalue()
    assert "0/6" in text
    assert "in the" in text
    assert "..." in text
