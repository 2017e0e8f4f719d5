"""The command line on runs: status, logs, stop, cancel, resume; what stands there is a record, nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model import storage
from model.contract import Cause
from orchestrator import cli, commands
from tests.orchestrator.written import Run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOCTL_RUNS", raising=False)


def parsed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["status", "logs", "stop", "cancel", "resume", "watch", "tick"])
def test_an_unknown_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "runs" / "known")
    assert cli.main([command, "unknown"]) == 2
    assert "no run 'unknown'; runs in runs: known" in capsys.readouterr().err


def test_status_of_all_and_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Run(tmp_path / "elsewhere" / name).launch(1, "pretrain")
    assert cli.main(["status"]) == 0
    assert "no runs in runs" in capsys.readouterr().out
    for words in ([], ["--json"]):
        assert cli.main(["status", "--runs", "elsewhen", *words]) == 2
        assert "no such folder of runs: elsewhen" in capsys.readouterr().err
    assert cli.main(["status", "--runs", "elsewhere"]) == 0
    assert "one" in capsys.readouterr().out
    assert cli.main(["status", "--runs", "elsewhere", "--json"]) == 0
    assert [run["run"] for run in parsed(capsys)] == ["one", "two"]
    assert cli.main(["status", "elsewhere/one", "--json"]) == 0
    view = parsed(capsys)
    assert view["summary"]["stage"] == "pretrain"
    assert view["attempts"][0]["status"] == "launched"
    assert cli.main(["status", "two", "--runs", "elsewhere"]) == 0
    assert "two: running" in capsys.readouterr().out


def test_a_run_that_is_done_needs_no_watcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.watch.detach", lambda run_dir: pytest.fail(f"{run_dir} is watched"))
    run = Run(tmp_path / "runs" / "tiny")
    run.done()
    assert commands._go_on(run.path, cli.parse(["submit", "job.yaml", "--detach"])) == 0
    assert f"the run is done, there is nothing left to watch; dinoctl status {run.path}" in capsys.readouterr().out


def test_a_log_that_contradicts_itself_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "runs" / "tiny").done()
    files = sorted((tmp_path / "runs" / "tiny" / "events").iterdir())
    files[2].write_bytes(files[1].read_bytes())
    assert cli.main(["status", "tiny"]) == 2
    assert "contradicts itself" in capsys.readouterr().err


def test_a_torn_heartbeat_blocks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "runs" / "tiny").watched(host="elsewhere")
    torn = tmp_path / "runs" / "tiny" / "watchers" / "torn.json"
    torn.write_text("{")
    assert cli.main(["status"]) == 0
    assert "unreadable" not in capsys.readouterr().out
    assert cli.main(["status", "tiny"]) == 0
    said = capsys.readouterr().out
    assert f"cannot be read: {torn}" in said
    assert "tiny: running" in said
    assert cli.main(["cancel", "tiny"]) == 0
    assert not torn.exists()


def test_the_folder_of_runs_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(tmp_path / "elsewhere" / "one")
    monkeypatch.setenv("DINOCTL_RUNS", str(tmp_path / "elsewhere"))
    assert cli.main(["status", "one"]) == 0


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    assert cli.main(["logs", "tiny"]) == 2
    assert "has no attempts yet" in capsys.readouterr().err
    run.launch(1, "pretrain")
    run.log(1, "first\n")
    run.end(1, Cause.KILLED, [])
    run.launch(2, "pretrain")
    run.log(2, "zweiter: ä\n")
    assert cli.main(["logs", "tiny"]) == 0
    assert capsys.readouterr().out == "zweiter: ä\n"
    assert cli.main(["logs", "tiny", "--attempt", "1", "--follow"]) == 0
    assert capsys.readouterr().out == "first\n"
    for attempt in ("7", "0"):
        assert cli.main(["logs", "tiny", "--attempt", attempt]) == 2
        assert f"no attempt {attempt}" in capsys.readouterr().err
    storage.publish(f"{run.path}/attempts/2/log/agent-1.log", b"of another node\n")
    assert cli.main(["logs", "tiny", "--node", "1"]) == 0
    assert cli.main(["logs", "tiny", "--node", "0"]) == 0
    assert capsys.readouterr().out == "of another node\nzweiter: ä\n"
    assert cli.main(["logs", "tiny", "--node", "2"]) == 2
    assert "there are: agent-1.log, agent.log" in capsys.readouterr().err
    assert cli.main(["logs", "tiny", "--rank", "3"]) == 2
    assert "there are: agent-1.log, agent.log" in capsys.readouterr().err
    assert cli.main(["logs", "tiny", "--attempt", "1", "--rank", "3", "--follow"]) == 2  # it is over: none will come
    assert "no such log" in capsys.readouterr().err


def test_a_log_is_followed_that_comes_late_and_ends_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a cluster's node, over a network file system."""
    run = Run(tmp_path / "runs" / "tiny", launcher="slurm")
    run.launch(1, "pretrain")
    log = tmp_path / "runs" / "tiny" / "attempts" / "1" / "log" / "agent.log"
    steps = [
        lambda: None,
        lambda: run.log(1, "begun\n"),
        lambda: run.end(1, Cause.STOPPED, []),
        lambda: log.write_text("begun\nthe last line\n"),
    ]
    clock = iter(range(1000))
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: steps.pop(0)() if steps else None)
    assert cli.main(["logs", "tiny", "--follow"]) == 0
    assert capsys.readouterr().out == "begun\nthe last line\n"


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    first = next(Path(run.path).glob("events/*.json"))
    newer = first.read_text().replace('"format":1', '"format":999')
    first.unlink()
    first.write_text(newer)
    assert cli.main(["status", "tiny"]) == 2
    said = capsys.readouterr().err
    assert "format 999" in said
    assert "Traceback" not in said


def test_nothing_to_resume_or_cancel_when_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "runs" / "tiny").done()
    assert cli.main(["resume", "tiny"]) == 2
    assert "is done" in capsys.readouterr().err
    for command in ("cancel", "stop"):
        assert cli.main([command, "tiny"]) == 2
        assert "is done" in capsys.readouterr().err


def test_cancel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(tmp_path / "runs" / "tiny")
    assert cli.main(["cancel", "tiny"]) == 0
    assert "run tiny is cancelled" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["stop", "tiny"], ["stop", "tiny", "--now"]])
def test_stop(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    for _ in range(2):  # a run that stands is left as it is
        assert cli.main(words) == 0
        assert f"run tiny is stopped; dinoctl resume {run.path} goes on" in capsys.readouterr().out
