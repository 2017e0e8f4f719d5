"""A step as a pure function, written down and replayed: the same numbers as training, by hand and in real jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import checkpoint, contract, parallel, progress, recording, replay, storage
from model.contract import CheckpointRef
from model.data.batch import SslBatch
from model.job import Job, Loop
from model.objectives.step import SslInputs, step
from model.recording import RecordingError
from model.sealed import CheckpointError
from orchestrator import cli, progress as told
from tests.model import test_ssl_objective as tiny, test_train as jobs
from tests.model.test_checkpoint import make_attempt

images = jobs.images  # the fixture
alone = jobs.alone


def gram_objective(**changes: Any) -> Any:
    own = tiny.objective(**changes)
    tiny.disturb(own.networks().frozen["gram_teacher"])
    return own


def inputs_of(own: Any, batch: SslBatch, micro_batches: int = 2) -> SslInputs:
    return cast(SslInputs, own.step_inputs(batch, tiny.MOMENT, micro_batches))


def write(path: Path, own: Any, inputs: SslInputs, **changes: Any) -> str:
    said = recording.results(step(own.step_networks(), inputs))
    weights = recording.network_tensors(own.step_networks())
    data = recording.pack(tiny.MODEL.model_dump(mode="json"), weights, inputs, said, {"step": 4}, **changes)
    path.write_bytes(data)
    return str(path)


def changed(path: str, **tensors: Tensor) -> str:
    """The same file with some tensors put in the place of its own."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **{name.replace("__", "."): t for name, t in tensors.items()}}, path, metadata)
    return path


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_function_says_what_training_computes(micro_batches: int) -> None:
    own, batch = gram_objective(), tiny.batch()
    outputs = step(own.step_networks(), inputs_of(own, batch, micro_batches))
    assert all(gradient is None for gradient in tiny.gradients(own).values())  # it changed nothing
    cuts = range(0, tiny.BATCH + 1, tiny.BATCH // micro_batches)
    assert tiny.same(outputs.terms, tiny.shares(own, batch, cuts))
    assert tiny.same(outputs.gradients, tiny.gradients(own))


def test_answers_that_do_not_fit_are_refused() -> None:
    own = gram_objective()
    inputs = inputs_of(own, tiny.batch())
    with parallel.recorded() as answers:
        step(own.step_networks(), inputs)
    with pytest.raises(ValueError, match="1 of 9 recorded answers"):
        step(own.step_networks(), replace(inputs, answers=(*answers, answers[0])))
    with pytest.raises(ValueError, match="fewer recorded answers"):
        step(own.step_networks(), replace(inputs, answers=tuple(answers[:-1])))
    with pytest.raises(ValueError, match=r"answer is \[3\], where \[24\] was asked"):
        step(own.step_networks(), replace(inputs, answers=(torch.zeros(3), *answers[1:])))


# --- the file and the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pretrain", "gram"])
def test_what_is_written_is_replayed(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = gram_objective() if kind == "gram" else tiny.objective(kind)
    path = write(tmp_path / "a.safetensors", own, inputs_of(own, tiny.batch(gram_size=32 if kind == "gram" else 0)))
    assert replay.main([path, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in ("terms.total", "terms.dino_local", "terms.koleo", "gradient_norms.ibot_head", "are equal within"):
        assert name in said
    assert replay.main([path, "--device", "cpu", "--double", "--tolerance", "1e-3"]) == 0


def test_without_local_crops_and_draws(tmp_path: Path) -> None:
    crops = {"resolutions": [{"global_size": 16, "local_size": 8}], "local_count": 0}
    own = tiny.objective("pretrain", model=tiny.PLAIN, crops=crops)
    path = write(tmp_path / "a.safetensors", own, inputs_of(own, tiny.batch(gram_size=0, locals_=0), 1))
    assert recording.read(path).inputs.draws[0].of_local is None
    assert replay.main([path, "--device", "cpu"]) == 0


def test_a_nudged_weight_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = gram_objective()
    path = write(tmp_path / "a.safetensors", own, inputs_of(own, tiny.batch()))
    name = "student.backbone.blocks.1.mlp.fc1.weight"
    weight = load_file(path)[name]
    weight[0, 0] += 0.1
    assert replay.main([changed(path, **{name: weight}), "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "differ by more than 0.0001" in said
    assert "terms.total" in said.splitlines()[-1]


def test_numbers_that_are_not_finite_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tiny.objective("pretrain")
    batch = tiny.batch(gram_size=0)
    batch.global_crops[0, 0] = torch.nan
    path = write(tmp_path / "a.safetensors", own, inputs_of(own, batch))
    assert replay.main([path, "--device", "cpu"]) == 0
    assert "nan" in capsys.readouterr().out
    assert replay.main([changed(path, terms__total=torch.tensor(1.0, dtype=torch.float64)), "--device", "cpu"]) == 1


@pytest.mark.parametrize("weight", [torch.inf, -torch.inf, torch.nan])
def test_settings_that_are_not_finite_are_in_the_header(weight: float, tmp_path: Path) -> None:
    """Weights are products of settings, and may overflow."""
    own = tiny.objective("pretrain")
    inputs = inputs_of(own, tiny.batch(gram_size=0))
    weights = {**inputs.scalars.weights, "dino_local": weight}
    inputs = replace(inputs, scalars=replace(inputs.scalars, weights=weights, teacher_temp=torch.inf))
    path = write(tmp_path / "a.safetensors", own, inputs)
    with safe_open(path, framework="pt") as file:
        header = json.loads(
            file.metadata()[recording.HEADER], parse_constant=pytest.fail
        )  # Infinity and NaN are no JSON
    assert header["scalars"]["weights"]["dino_local"] == str(weight)
    read = recording.read(path).inputs.scalars
    assert read.weights["dino_local"] == pytest.approx(weight, nan_ok=True)
    assert read.teacher_temp == torch.inf
    assert replay.main([path, "--device", "cpu"]) == 0


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tiny.objective("pretrain")
    good = write(tmp_path / "a.safetensors", own, inputs_of(own, tiny.batch(gram_size=0)))
    (tmp_path / "torn").write_bytes(Path(good).read_bytes()[:-1])
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with safe_open(good, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(good)
    save_file({name: tensor for name, tensor in tensors.items() if name != "batch.masks"}, tmp_path / "less", header)
    newer = {recording.HEADER: json.dumps({**json.loads(header[recording.HEADER]), "format": 2})}
    save_file(tensors, tmp_path / "newer", newer)
    kept = {name: tensor for name, tensor in tensors.items() if name != "student.backbone.cls_token"}
    save_file(kept, tmp_path / "weightless", header)
    for name, said in {
        "missing": "No such file",
        "torn": "not a recorded step",
        "other": "its header has no 'dinoctl-step'",
        "less": "no batch.masks",
        "newer": "of format 2",
        "weightless": "missing student.backbone.cls_token",
    }.items():
        assert replay.main([str(tmp_path / name)]) == 2, name
        assert said in capsys.readouterr().err


# --- as training does it ----------------------------------------------------------------------------------------------


def job(run_dir: Path | str, own: Any, last: CheckpointRef | None = None) -> Job:
    attempt = make_attempt(run_dir, model=tiny.MODEL.model_dump(mode="json"))
    nothing: Any = None
    return Job(
        attempt,
        own.settings,
        torch.device("cpu"),
        stop=nothing,
        progress=progress.Progress(attempt, tiny.MOMENT.steps),
        objective=own,
        optimizer=nothing,
        loader=nothing,
        saver=nothing,
        loop=Loop(step=3, origin="pretrain", clock=13, position=104),
        last_sealed=last,
    )


def seal(own: Any, run_dir: Path | str) -> CheckpointRef:
    attempt = make_attempt(run_dir)
    checkpoint.seal(attempt, 3, own.state(), {}, {"step": 3}, {})
    return CheckpointRef(run=str(run_dir), phase=attempt.phase, attempt=1, step=3)


def test_large_networks_are_left_in_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_WEIGHTS", 1000)
    own = gram_objective()
    recording.record(job(tmp_path, own, seal(own, tmp_path)), tiny.batch(), tiny.MOMENT)
    path = f"{tmp_path}/{contract.recorded_file(1, 4, 0)}"
    recorded = recording.read(path)
    assert recorded.weights == {}
    assert replay.main([path, "--device", "cpu"]) == 0
    storage.remove_tree(f"{tmp_path}/checkpoints")
    with pytest.raises(CheckpointError, match="was never sealed, or was pruned"):
        replay.replay(recorded)
    assert replay.main([path]) == 2


@pytest.mark.jobs
@pytest.mark.requires("s3")
def test_a_step_of_a_run_in_a_bucket(
    s3: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file, and the checkpoint that it names, by the URI."""
    monkeypatch.setattr(recording, "MOST_WEIGHTS", 1000)
    own, run = gram_objective(), f"{s3}/run"
    recording.record(job(run, own, seal(own, run)), tiny.batch(), tiny.MOMENT)
    path = f"{run}/{contract.recorded_file(1, 4, 0)}"
    assert cli.main(["replay", path, "--device", "cpu"]) == 0, capfd.readouterr()
    assert cli.main(["replay", f"{path}x", "--device", "cpu"]) == 2
    assert f"{path}x cannot be replayed: fetching {path}x: there is no such file" in capfd.readouterr().err
    storage.publish(f"{run}/{contract.dropped_file('pretrain', 1, 3, 'student')}", b"")
    assert cli.main(["replay", path, "--device", "cpu"]) == 2
    assert "has no student any more" in capfd.readouterr().err


def test_large_networks_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_WEIGHTS", 1000)
    recording.record(job(tmp_path, gram_objective()), tiny.batch(), tiny.MOMENT)
    with pytest.raises(RecordingError, match="names no checkpoint"):
        replay.replay(recording.read(f"{tmp_path}/{contract.recorded_file(1, 4, 0)}"))


def test_a_file_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("in the way")
    this = job(tmp_path, tiny.objective("pretrain"))
    recording.record(this, tiny.batch(gram_size=0), tiny.MOMENT)
    assert "step 4 could not be recorded" in this.progress._notes[0]


def test_when_a_step_is_due() -> None:
    settings = tiny.settings("pretrain", debug={"record_step": 4})
    assert [step for step in range(10) if recording.due(settings, replace(tiny.MOMENT, step=step))] == [3]
    assert not recording.due(tiny.settings("pretrain"), tiny.MOMENT)


@pytest.mark.jobs
def test_a_run_that_is_told_to_records_and_ends_the_same(
    alone: jobs.Ran, tmp_path: Path, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = jobs.phase_settings(images, debug={"record_step": 10})
    ran = jobs.train(jobs.describe(tmp_path, images, settings=settings))
    jobs.assert_same_state(jobs.ref(alone, jobs.STEPS), jobs.ref(ran, jobs.STEPS))
    for rank in range(2):
        path = f"{tmp_path}/{contract.recorded_file(1, 10, rank)}"
        assert cli.main(["replay", path, "--device", "cpu"]) == 0, ran.log()
        assert f"pretrain step 10, rank {rank} of 2" in capfd.readouterr().out
    sums = [sum(recording.read(f"{tmp_path}/{contract.recorded_file(1, 10, rank)}").results["terms.total"]
                for rank in range(2))]  # fmt: skip
    assert sums == [pytest.approx(told.steps(str(tmp_path), 1)[9].metrics["loss"], rel=1e-6)]


@pytest.mark.jobs
def test_the_first_step_that_is_not_finite_is_recorded(tmp_path: Path, images: Path) -> None:
    settings = jobs.phase_settings(images, losses={"koleo": {"weight": 1e308}})
    jobs.train(jobs.describe(tmp_path, images, settings=settings), 1)
    assert storage.names(f"{tmp_path}/attempts/1/recorded") == ["1-rank0.safetensors"]
    assert cli.main(["replay", f"{tmp_path}/{contract.recorded_file(1, 1, 0)}", "--device", "cpu"]) == 0
