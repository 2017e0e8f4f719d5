"""A step of text alignment, written down and replayed: by hand, by one rank of two, and in a real job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from model import contract, parallel, recording, replay, storage
from model.objectives import kinds
from model.objectives.pure import Outputs
from model.objectives.text_step import TextInputs, step
from orchestrator import cli, progress as told
from tests.model import test_replay as replays, test_text_objective as tiny, test_train as jobs

images = jobs.images  # the fixture


def compute(own: Any, batch: Any, micro_batches: int) -> tuple[TextInputs, Outputs]:
    inputs = own.step_inputs(batch, tiny.MOMENT, micro_batches)
    with parallel.recorded() as answers:
        outputs = step(own.step_networks(), inputs)
    return replace(inputs, answers=tuple(answers) if parallel.world() > 1 else None), outputs


def write(path: Path, own: Any, inputs: TextInputs, outputs: Outputs, compute: str = "fp32") -> str:
    data = recording.pack(
        tiny.MODEL.model_dump(mode="json"),
        recording.network_tensors(own.step_networks()),
        inputs,
        recording.results(outputs),
        {"step": 4, "rank": parallel.rank(), "world": parallel.world()},
        added=kinds.added(tiny.settings(compute=compute)),
    )
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_function_says_what_training_computes(micro_batches: int) -> None:
    own = tiny.objective()
    _, outputs = compute(own, tiny.batch(), micro_batches)
    loss, gradients = tiny.gradients(own, tiny.batch(), 8 // micro_batches)
    assert outputs.terms["contrastive"].item() == pytest.approx(loss, rel=1e-6)
    tiny.same(outputs.gradients, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_is_replayed(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tiny.objective(compute=precision)
    path = write(tmp_path / "a.safetensors", own, *compute(own, tiny.batch(), 2), precision)
    assert replay.main([path, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in ("terms.contrastive", "terms.total", "gradient_norms.vision_head", "gradient_norms.text_tower",
                 "gradient_norms.logit_scale", "8 of 8 images in 2 micro-batches"):  # fmt: skip
        assert name in said
    tolerance = {"fp32": "1e-4", "bf16": "0.1"}[precision]
    assert replay.main([path, "--device", "cpu", "--double", "--tolerance", tolerance]) == 0


@pytest.mark.parametrize("name", ["student.text_tower.blocks.0.mlp.fc1.weight", "teacher.backbone.blocks.1.ls1.gamma"])
def test_a_nudged_weight_shows(name: str, tmp_path: Path) -> None:
    own = tiny.objective()
    path = write(tmp_path / "a.safetensors", own, *compute(own, tiny.batch(), 1))
    weight = load_file(path)[name]
    weight.view(-1)[0] += 0.5
    assert replay.main([replays.changed(path, **{name: weight}), "--device", "cpu"]) == 1


def test_large_networks_are_left_in_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_WEIGHTS", 1000)
    own = tiny.objective()
    job = replays.job(tmp_path, own, replays.seal(own, tmp_path))
    job.attempt = msgspec.structs.replace(job.attempt, model=tiny.MODEL.model_dump(mode="json"))
    recording.record(job, tiny.batch(), tiny.MOMENT)
    path = f"{tmp_path}/{contract.recorded_file(1, 4, 0)}"
    assert recording.read(path).weights == {}
    assert replay.main([path, "--device", "cpu"]) == 0


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = tiny.objective()
    inputs, outputs = compute(own, tiny.batch(4 * rank, 4 * rank + 4), 2)
    write(folder / f"{rank}.safetensors", own, inputs, outputs)
    parallel.leave()


@pytest.mark.jobs
def test_each_of_two_ranks_is_replayed_alone(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, args=(tmp_path,), nprocs=2)
    loss, _ = tiny.gradients(tiny.objective(), tiny.batch(), 8)
    total = 0.0
    for rank in range(2):
        recorded = recording.read(f"{tmp_path}/{rank}.safetensors")
        rows = replay.compare(recorded.results, replay.replay(recorded))
        assert [row for row in rows if row.difference() > 1e-5] == []
        assert {row.name for row in rows} >= {"terms.contrastive", "terms.total", "gradient_norms.text_tower"}
        total += recorded.results["terms.total"]
    assert total == pytest.approx(loss, rel=1e-5)


def text_settings(images: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "text", "steps": 3, "data": {"path": str(images), "workers": 1}, "vision_tower": "pretrain@final",
        "optim": {"batch_size": 8, "group_size": 2, "accumulate": 2, "lr": 1e-3}, "checkpoints": {"every": 3},
        "image_size": 16, "embed_dim": 64, "head": {"blocks": 1, "drop_path": 0.5},
        "text": {"dim": 32, "depth": 1, "heads": 2, "context": 12, "vocabulary": 300}, **changes,
    }  # fmt: skip


@pytest.fixture
def captioned(images: Path) -> Path:
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture number {path.stem}")
    return images


@pytest.mark.jobs
def test_a_text_phase_that_is_told_to_records(
    captioned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = text_settings(captioned, debug={"record_step": 2})
    ran = jobs.train(jobs.describe(tmp_path, captioned, settings=settings, phase="text"))
    totals = []
    for rank in range(2):
        path = f"{tmp_path}/{contract.recorded_file(1, 2, rank)}"
        assert cli.main(["replay", path, "--device", "cpu"]) == 0, ran.log()
        assert f"text step 2, rank {rank} of 2" in capfd.readouterr().out
        totals.append(recording.read(path).results["terms.total"])
    assert sum(totals) == pytest.approx(told.steps(str(tmp_path), 1)[1].metrics["loss"], rel=1e-6)


@pytest.mark.jobs
def test_a_text_step_that_is_not_finite_is_recorded(captioned: Path, tmp_path: Path) -> None:
    settings = text_settings(captioned, data={"path": str(captioned), "workers": 1, "std": [1e-45, 1e-45, 1e-45]})
    jobs.train(jobs.describe(tmp_path, captioned, settings=settings, phase="text"), 1)
    assert storage.names(f"{tmp_path}/attempts/1/recorded") == ["1-rank0.safetensors"]
    assert cli.main(["replay", f"{tmp_path}/{contract.recorded_file(1, 1, 0)}", "--device", "cpu"]) == 0
