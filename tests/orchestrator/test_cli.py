"""The command line: help, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model import storage
from model.contract import ContractError, manifest_file
from model.storage import DiskFullError, StoreError
from orchestrator import cli, commands, mistakes
from tests.orchestrator.written import Run

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs" / "demo.yaml")
COMMANDS = [
    "validate",
    "plan",
    "submit",
    "schema",
    "status",
    "logs",
    "stop",
    "cancel",
    "resume",
    "watch",
    "tick",
    "replay",
    "ckpt",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DINOCTL_RUNS", raising=False)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a black square\n")


def job(*words: str) -> list[str]:
    """A command's arguments on the demo, with a data folder that is there."""
    return [words[0], DEMO, "data.path=images", *words[1:]]


def parsed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# --- help and options -------------------------------------------------------------------------------------------------


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in [*COMMANDS, "exit codes:", "130", "DINOCTL_RUNS"]:
        assert word in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_function(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert "exit codes:" in capsys.readouterr().out
    assert callable(getattr(commands, command))


@pytest.mark.parametrize("words", [[], ["nonsense"], ["status", "--nonsense"], ["status", "a", "b"], ["logs"]])
def test_what_cannot_be_parsed_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_overrides_may_stand_anywhere() -> None:
    options = cli.parse(["submit", "job.yaml", "a=1", "--run", "x", "b.c=2", "--detach", "d=3"])
    assert options.overrides == ["a=1", "b.c=2", "d=3"]
    assert (options.file, options.run, options.detach) == ("job.yaml", "x", True)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("dinoctl ")


# --- on a job file ----------------------------------------------------------------------------------------------------


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("validate")) == 0
    assert "valid. Phases: pretrain" in capsys.readouterr().out


def test_validate_resolved_can_be_submitted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("validate", "--resolved")) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["validate", "resolved.yaml", "--json"]) == 0
    again = parsed(capsys)["job"]
    assert cli.main(job("validate", "--json")) == 0
    assert parsed(capsys)["job"] == again


def test_validate_tells_every_mistake_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("validate", "sed=1", "optim.batch_size=no")) == 2
    said = capsys.readouterr().err
    assert "2 mistakes" in said
    assert "did you mean seed?" in said
    assert "optim.batch_size" in said
    assert "Traceback" not in said


def test_validate_as_json_when_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("validate", "sed=1", "--json")) == 2
    answer = parsed(capsys)
    assert answer["valid"] is False
    assert [problem["path"] for problem in answer["problems"]] == ["sed"]


def test_resolved_text_that_looks_like_a_number_stays_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("validate", "tracking.experiment='1e5'", "--resolved")) == 0
    assert "experiment: '1e5'" in capsys.readouterr().out


def test_plan_as_json_when_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("plan", "sed=1", "--json")) == 2
    assert [problem["path"] for problem in parsed(capsys)["problems"]] == ["sed"]


@pytest.mark.parametrize("name", ["", "Upper", "../up", "a b", "a\nb", "x" * 31, "-x"])
def test_a_name_that_a_run_cannot_have(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("submit", f"--run={name}")) == 2
    said = capsys.readouterr().err
    assert "option --run: not a name for a run" in said
    assert "at most 30 of a-z" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("runs", ["images/a.png", "/proc/nowhere"])
def test_a_folder_of_runs_that_cannot_be(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("submit", "--runs", runs)) == 2
    assert "--runs DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("gs://bucket/runs", "allowed: a folder, or s3://BUCKET/PREFIX"),
        ("s3:///runs", "runs: no place for runs"),
        ("s3://bucket/runs", "tracking.uri: missing"),
    ],
)
def test_a_uri_of_runs_that_cannot_be(runs: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("submit", "--runs", runs, "tracking.enabled=true")) == 2
    assert message in capsys.readouterr().err


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("plan")) == 0
    assert "gram_teacher" in capsys.readouterr().out
    assert cli.main(job("plan", "--json")) == 0
    assert [phase["name"] for phase in parsed(capsys)["phases"]] == ["pretrain", "gram", "highres", "text"]


def test_without_captions_the_demo_leaves_its_text_phase_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "a.txt").write_text("\n")
    assert cli.main(job("validate", "--json")) == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)["job"]["phases"]) == ["pretrain", "gram", "highres"]
    left_out, of_one_image = said.err.splitlines()
    assert left_out.startswith("dinoctl: phase text is left out: no image in")
    assert of_one_image.startswith("dinoctl: phases.pretrain.optim.batch_size, ")


def test_a_text_phase_that_was_asked_for_is_refused_without_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "a.txt").unlink()
    assert cli.main(job("validate", "phases.text.without_captions=fail")) == 2
    said = capsys.readouterr().err
    assert "no image of the folder has a caption" in said
    assert "phases.text.without_captions=skip" in said


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert "phases" in parsed(capsys)["properties"]


def test_a_dry_run_shows_what_would_be_sent_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(job("submit", "--dry-run", "--run", "x")) == 0
    text = capsys.readouterr().out
    assert "phase: pretrain" in text
    assert f"model.agent {tmp_path}/runs/x/attempts/1/attempt.yaml" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_controller_on_a_cluster_without_jobs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job("submit", "controller.on=cluster")) == 2
    assert "not there yet: a controller on local, whose launcher is local and not slurm" in capsys.readouterr().err


# --- what is of another run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "plan"])
@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("nobody#pretrain@4", "nobody#pretrain@4: there is no run at {runs}/nobody"),
        ("tiny#pretrain@3", "tiny#pretrain@3: no such checkpoint; {runs}/tiny has sealed steps of pretrain: 4, 6"),
        ("tiny#what@4", "tiny#what@4: run tiny has the phases pretrain, gram"),
        ("tiny#pretrain@4", "tiny#pretrain@4: that checkpoint is no longer there"),
        ("torn#pretrain@4", "000001.json: torn: 1 bytes are no whole event"),
        ("tiny#pretrain@6", ""),
    ],
)
def test_checkpoints_of_other_runs_are_looked_for(
    command: str, reference: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "runs" / "tiny")
    run.done()
    storage.publish(f"{run.path}/{manifest_file('pretrain', 1, 6)}", b"{}")
    (tmp_path / "runs" / "torn" / "events").mkdir(parents=True)
    (tmp_path / "runs" / "torn" / "events" / "000001.json").write_text("{")
    code = cli.main(job(command, f"phases.pretrain.weights={reference}"))
    said = capsys.readouterr().err
    assert (code, "1 mistake" in said) == ((2, True) if why else (0, False)), said
    assert why.format(runs=tmp_path / "runs") in said
    assert not why or "phases.pretrain.weights" in said
    if why and "torn" not in reference:
        assert cli.main(job("submit", f"phases.pretrain.weights={reference}", "--run=new")) == 2
        assert why.format(runs=tmp_path / "runs") in capsys.readouterr().err


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DiskFullError(28, "writing x: No space left on device"), 3),
        (StoreError(5, "reading x: Input/output error"), 1),
        (ContractError("x.json: torn"), 2),
    ],
)
def test_known_exceptions_are_a_message_and_a_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr(commands, "status", fails)
    assert cli.main(["status"]) == code
    assert "x" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "status", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["status"])


def test_every_exit_code_is_documented() -> None:
    for code in {*mistakes.EXIT_CODES.values(), 0, 130}:
        assert f"  {code} " in cli.EXIT_CODES
