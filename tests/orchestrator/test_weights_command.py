"""Weights that a job names: told from checkpoints of runs, looked at before anything starts; `dinoctl weights`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model import contract, storage
from orchestrator import handoff, spec, weights_command
from orchestrator.problems import SpecError
from tests.orchestrator.written import Run

ROOT = Path(__file__).parents[2]

JOB = """
name: tiny
data: {path: images}
model:
  backbone: {arch: custom, dim: 32, depth: 2, heads: 2, patch_size: 8, registers: 2}
  dino_head: {prototypes: 32, hidden: 32, bottleneck: 16}
  ibot_head: {prototypes: 32, hidden: 32, bottleneck: 16}
optim: {batch_size: 16, group_size: 4, lr: 0.001}
crops: {resolutions: [{global_size: 32, local_size: 16}]}
checkpoints: {every: 2}
phases:
  pretrain: {kind: pretrain, steps: 4, WEIGHTS}
"""


def read(folder: Path, inputs: str) -> spec.Job:
    file = folder / "job.yaml"
    file.write_text(JOB.replace("WEIGHTS", inputs))
    return spec.read_job(str(file), check_data=False)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("a.pth", True), ("models/vits16", True), ("https://a.b/c", True), ("s3://b/c.safetensors", True),
        ("pretrain@final", False), ("runs/a#pretrain@5", False), ("runs/a#pretrain@last", False), ("pretrain", False),
    ],
)  # fmt: skip
def test_files_are_told_from_references(text: str, file: bool) -> None:
    assert handoff.is_file("weights", text) is file
    assert not handoff.is_file("gram_teacher", text)


def test_a_file_is_no_reference_and_its_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"")
    resolved = spec.resolved(read(tmp_path, "weights: a.pth"))
    assert handoff.files(resolved, "pretrain") == {"weights": str(tmp_path / "a.pth")}
    assert handoff.references(resolved, "pretrain") == {}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("weights: ./nothing.pth", "no such file or folder of weights"),
        ("weights: nothing", "not a reference to a checkpoint"),
        ("weights: job.yaml/.., init: other#pretrain@2", "init and weights exclude each other"),
    ],
)
def test_what_is_not_there_is_told_at_once(
    inputs: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=says):
        read(tmp_path, inputs)


@pytest.mark.jobs
def test_a_file_that_holds_no_weights_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("no weights")
    found = weights_command.problems(spec.resolved(read(tmp_path, f"weights: {tmp_path / 'a.pth'}")))
    assert [problem.at for problem in found] == [("phases", "pretrain", "weights")]
    assert "no file of torch.save" in found[0].message


def test_a_run_and_a_checkpoint_of_it_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "runs" / "tiny")
    run.done()
    for phase, attempt in (("pretrain", 1), ("gram", 2)):
        storage.publish(f"{run.path}/{contract.manifest_file(phase, attempt, 4)}", b"{}")
    assert weights_command.place("tiny", "runs") == f"{run.path}/{contract.checkpoint_dir('gram', 2, 4)}"
    wanted = f"{run.path}/{contract.checkpoint_dir('pretrain', 1, 4)}"
    assert weights_command.place("tiny#pretrain@4", "runs") == wanted
    assert weights_command.place("runs/tiny#pretrain@4", "elsewhere") == wanted
    with pytest.raises(handoff.HandoffError, match="no such checkpoint"):
        weights_command.place("tiny#pretrain@3", "runs")
    with pytest.raises(handoff.HandoffError, match="no longer there"):
        weights_command.place("tiny#pretrain@6", "runs")
    for other in ("vits16", "a.pth", "s3://b/a.pth"):
        assert weights_command.place(other, "runs") == other
    assert storage.is_uri("s3://b/a.pth")


def dinoctl(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.jobs
def test_the_command_says_what_it_says() -> None:
    done = dinoctl("weights", "info", "vits16")
    assert done.returncode == 0
    assert "188 tensors, 21,601,152 parameters" in done.stdout
    wrong = dinoctl("weights", "convert", "nothing.pth", "x", "--to", "timm")
    assert (wrong.returncode, wrong.stderr) == (2, "dinoctl: no such file or folder: nothing.pth\n")


@pytest.mark.jobs
def test_who_reads_no_further_is_told_nothing() -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "weights", "info", "vit7b16"]
    begun = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert begun.stdout is not None
    begun.stdout.close()
    assert begun.communicate()[1] == ""
    assert begun.returncode == 0
