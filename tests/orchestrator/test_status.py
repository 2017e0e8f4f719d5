"""What `status` says of runs in every situation."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import storage
from model.contract import Cause, checkpoint_dir, manifest_file
from orchestrator import events, overview, status
from tests.orchestrator.written import Run

NOW = 1005.0


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    summary = status.summary(run.path, NOW)
    assert (summary.run, summary.status, summary.stage, summary.number, summary.stages) == (
        "tiny", "running", "pretrain", 1, 3,
    )  # fmt: skip
    assert (summary.step, summary.steps, summary.attempt) == (0, 6, 0)
    assert summary.watch == status.Watch(host=None, pid=None, since=None)
    assert summary.advice == f"dinoctl resume {run.path}"


def test_a_live_run_that_somebody_watches(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0})
    run.watched()
    summary = status.summary(run.path, NOW)
    assert (summary.step, summary.attempt, summary.cause, summary.advice) == (2, 1, None, "")
    assert summary.watch == status.Watch(host="elsewhere", pid=7, since=900.0)


def test_what_a_live_attempt_has_sealed_is_shown_before_it_ends(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    storage.publish(f"{run.path}/{manifest_file('pretrain', 1, 2)}", b"{}")
    (tmp_path / "tiny" / checkpoint_dir("pretrain", 1, 4)).mkdir()  # being written: no manifest, no checkpoint
    view = status.detail(run.path, NOW)
    assert (view.stages[0].sealed, view.attempts[0].sealed) == ([2], [2])
    run.end(1, Cause.KILLED, [], "rank 0 was killed")
    view = status.detail(run.path, NOW)
    assert (view.stages[0].sealed, view.attempts[0].sealed) == ([], [])


def test_of_the_checkpoints_that_count_those_that_are_there_are_told_apart(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    for attempt, counted in ((1, [2, 4]), (2, [5])):
        run.launch(attempt, "pretrain")
        for step in (4, 5) if attempt == 1 else (5,):  # 2 was pruned; the first 5 is a zombie's
            storage.publish(f"{run.path}/{manifest_file('pretrain', attempt, step)}", b"{}")
        run.end(attempt, Cause.KILLED, counted)
    stage = status.detail(run.path, NOW).stages[0]
    assert (stage.sealed, stage.there) == ([2, 4, 5], [4, 5])
    storage.remove(f"{run.path}/{manifest_file('pretrain', 2, 5)}")
    assert status.detail(run.path, NOW).stages[0].there == [4]


def test_nobody_watches_any_more(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.watched()
    summary = status.summary(run.path, NOW + 3600)
    assert summary.watch == status.Watch(host=None, pid=None, since=1000.0)
    assert summary.advice == f"dinoctl resume {run.path}"


def test_a_controller_that_is_a_job_is_named_while_it_watches_and_while_it_waits(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    storage.publish(f"{run.path}/controller.json", b'{"job":"57","name":"tiny-12345678-controller","submitted_at":1.0}')
    waits = status.summary(run.path, NOW).watch
    assert overview.watched(waits, NOW) == "nobody; job 57 (tiny-12345678-controller) is to, once the cluster starts it"
    run.watched(command="job 57")
    assert overview.watched(status.summary(run.path, NOW).watch, NOW) == "elsewhere/7 for 1 min; job 57"


def test_a_run_whose_job_waits_for_the_attempts_end_needs_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain", job="57", end_job="58")
    summary = status.summary(run.path, NOW)
    assert overview.watched(summary.watch, NOW) == "nobody; job 58 looks what is due when the attempt ends"
    assert summary.advice == ""


def test_a_phase_that_is_resumed_is_where_it_was_sealed(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0, 3: 4.0})
    run.end(1, Cause.KILLED, [2], "rank 0 was killed")
    assert status.summary(run.path, NOW).cause is Cause.KILLED
    run.launch(2, "pretrain")
    assert status.summary(run.path, NOW).step == 2


def test_a_run_that_failed_shows_why_and_what_to_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.end(1, Cause.DIVERGED, [2], "loss/dino is not finite", detail="\n".join(f"line {n}" for n in range(100)))
    run.add(events.RunFailed, cause=Cause.DIVERGED, message="loss/dino is not finite. See runbooks/diverged.md")
    view = status.detail(run.path, NOW)
    assert view.summary.status == "failed"
    assert view.runbook == "runbooks/diverged.md"
    assert len(view.tail) == status.TAIL_LINES
    assert view.tail[-1] == "line 99"
    assert [stage.status for stage in view.stages] == ["begun", "waiting", "waiting"]
    assert view.stages[0].sealed == [2]


def test_without_a_word_of_the_agent_its_log_is_shown(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.log(1, "the last line\n")
    run.end(1, Cause.VANISHED, [], "gone")
    assert status.detail(run.path, NOW).tail == ["the last line"]


def test_a_run_that_is_done(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.done()
    run.report()
    view = status.detail(run.path, NOW)
    assert view.summary.status == "done"
    assert (view.summary.watch, view.summary.advice, view.tail, view.runbook) == (None, "", [], None)
    assert [stage.status for stage in view.stages] == ["done", "done", "done"]
    assert [attempt.cause for attempt in view.attempts] == [Cause.DONE] * 3
    assert view.report is not None


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("contradicts", "gap", "torn", "well"):
        Run(tmp_path / name).done()
    events_of = {name: sorted((tmp_path / name / "events").iterdir()) for name in ("contradicts", "gap", "torn")}
    events_of["gap"][2].unlink()
    events_of["torn"][2].write_bytes(b'{"event":')
    events_of["contradicts"][2].write_bytes(events_of["contradicts"][1].read_bytes())
    found = {run.run: run for run in status.summaries(str(tmp_path), NOW)}
    assert {name: run.status for name, run in found.items()} == {
        "contradicts": "unreadable", "gap": "unreadable", "torn": "unreadable", "well": "done",
    }  # fmt: skip
    assert "000003.json is missing" in found["gap"].message
    assert "000003.json: torn: 9 bytes are no whole event" in found["torn"].message
    assert "`weights: RUN/checkpoints/" in found["torn"].message
    assert found["torn"].advice == f"dinoctl status {tmp_path}/torn"


def test_what_else_lies_there_is_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.record(1, 0, {1: 6.0, 2: 5.0})
    for foreign in ("events/README", "attempts/1/progress/README", "attempts/1/progress/x.jsonl"):
        (tmp_path / "tiny" / foreign).write_text("of somebody else")
    (tmp_path / "other" / "events").mkdir(parents=True)
    (tmp_path / "other" / "events" / "notes.json").write_text("{}")
    assert status.names(str(tmp_path)) == ["tiny"]
    assert status.summary(run.path, NOW).step == 2


def test_a_users_mistake_is_told_in_one_line_without_the_log(tmp_path: Path) -> None:
    run = Run(tmp_path / "tiny")
    run.launch(1, "pretrain")
    run.log(1, "Traceback (most recent call last)")
    run.end(1, Cause.USER_ERROR, [], "no image has a caption")
    view = status.detail(run.path, NOW)
    assert (view.tail, view.attempts[0].message) == ([], "no image has a caption")


def test_runs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    (tmp_path / "runs" / "no-run").mkdir()
    runs = str(tmp_path / "runs")
    assert status.names(runs) == ["tiny"]
    assert status.find("tiny", runs) == run.path
    assert status.find(run.path, "elsewhere") == run.path


def test_an_unknown_run_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    Run(tmp_path / "one")
    Run(tmp_path / "two")
    with pytest.raises(status.RunNotFoundError, match=r"no run 'three'; runs in .*: one, two"):
        status.find("three", str(tmp_path))
    with pytest.raises(status.RunNotFoundError, match="there are no runs in"):
        status.find("three", str(tmp_path / "nowhere"))


def test_a_run_that_is_removed_under_a_command_is_told_in_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path / "one")
    for file in (tmp_path / "one" / "events").iterdir():
        file.unlink()
    with pytest.raises(status.RunNotFoundError, match=r"one holds no run any more: its events were removed"):
        status.load(run.path)
