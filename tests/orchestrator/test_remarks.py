"""What is said of a job that is right and hardly meant so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.cluster import read_cluster
from orchestrator.remarks import remarks
from orchestrator.spec import read_job

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/orchestrator/valid.yaml"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with as many images as a batch has."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "more"):
        (tmp_path / name).mkdir()
    for number in range(16):
        (tmp_path / f"images/{number}.png").touch()
    (tmp_path / "images/0.txt").write_text("a ball")


def said(*overrides: str) -> list[str]:
    job = read_job(str(TINY), overrides)
    return remarks(job, read_cluster(job.cluster))


def test_of_most_jobs_nothing_is_said() -> None:
    assert said() == []
    assert said("phases.text.steps=3") == []  # as long as the warm-up


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_of_the_jobs_that_ship_nothing_is_said(file: Path) -> None:
    job = read_job(str(file), ["cluster=h100_slurm"], check_data=False)
    assert remarks(job, read_cluster(job.cluster)) == []


def test_a_warm_up_longer_than_its_phase() -> None:
    of = "3 steps of warm-up are more than the phase has (2): it ends before the peak of 0.001"
    assert said("phases.text.steps=2") == [f"phases.text.optim.lr.warmup_steps: {of}"]
    weight = "phases.gram.losses.gram.weight={start: 0, peak: 2, warmup_steps: 11}"
    of = "11 steps of warm-up are more than the phase has (10): it ends before the peak of 2"
    assert said(weight) == [f"phases.gram.losses.gram.weight.warmup_steps: {of}"]
    assert said("phases.gram.losses.gram.weight={peak: 2, warmup_steps: 11}") == []  # it does not move


def test_a_batch_larger_than_the_images(tmp_path: Path) -> None:
    (tmp_path / "images/7.png").unlink()
    where = ", ".join(f"phases.{name}.optim.batch_size" for name in ("pretrain", "gram", "highres", "text"))
    of = f"16 images a step are more than there are (15 in {tmp_path}/images): some come twice or more in a batch"
    assert said() == [f"{where}: {of}"]
    (tmp_path / "more/1.jpg").touch()
    assert said("data.also=[{path: more, share: 0.1}]") == []
    assert said("cluster=h100_slurm") == []  # what lies there is not seen from here


def test_validate_says_it_and_finds_the_job_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(TINY), "phases.text.steps=2"]
    assert cli.main(["validate", *words]) == 0
    seen = capsys.readouterr()
    assert "valid. Phases" in seen.out
    assert seen.err.startswith("dinoctl: phases.text.optim.lr.warmup_steps: 3 steps of warm-up")
    assert cli.main(["validate", *words, "--json"]) == 0
    assert [line.partition(":")[0] for line in json.loads(capsys.readouterr().out)["remarks"]] == [
        "phases.text.optim.lr.warmup_steps"
    ]


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_what_submit_refuses_is_said_before(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more/1.jpg").touch()
    words = [str(TINY), "data.also=[{path: more, share: 0.1}]"]
    line = "phases.text.data.also: `submit` refuses it: not there yet: captions from more than one folder"
    assert cli.main([command, *words]) == 0
    assert f"dinoctl: {line} (hint: phases.text.data.also=[])\n" in capsys.readouterr().err
    assert cli.main(["validate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == [f"{line} (hint: phases.text.data.also=[])"]
    assert cli.main(["submit", *words]) == 2
    assert capsys.readouterr().err.count("captions from more than one folder") == 1
