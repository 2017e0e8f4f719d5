"""Four processes compute what one does on the same global batch, in float64, and each can be replayed alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from model import parallel, recording, replay
from model.data.batch import SslBatch
from model.objectives.pure import Outputs
from model.objectives.step import SslInputs, step
from tests.model import test_ssl_objective as tiny

RANKS = 4


def double(batch: SslBatch) -> SslBatch:
    own = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in vars(batch).items()}
    return SslBatch(**own)


def whole_step() -> tuple[Any, SslBatch]:
    """An objective in float64 and a batch of four groups, of which the last has no masked patch, and the first more
    than the others."""
    own = tiny.objective("gram", losses={"koleo": {"weight": 0.5}})
    tiny.disturb(own.networks().frozen["gram_teacher"])
    for number, name in enumerate(("teacher_backbone", "teacher_dino_head", "teacher_ibot_head"), 2):
        tiny.disturb(own.networks().frozen[name], seed=number)
    for module in own.step_networks().named().values():
        module.double()
    batch = copy.deepcopy(double(tiny.batch()))
    batch.masks[1, : tiny.GROUP, ::2] = True
    return own, batch


def compute(own: Any, batch: SslBatch) -> tuple[SslInputs, Outputs, list[Tensor]]:
    inputs = own.step_inputs(batch, tiny.MOMENT, micro_batches=1)
    with parallel.recorded() as answers:
        outputs = step(own.step_networks(), inputs)
    return inputs, outputs, answers


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    own, batch = whole_step()
    size = tiny.BATCH // RANKS
    inputs, outputs, answers = compute(own, batch.slice(rank * size, (rank + 1) * size))
    data = recording.pack(
        tiny.MODEL.model_dump(mode="json"),
        recording.network_tensors(own.step_networks()),
        replace(inputs, answers=tuple(answers)),
        recording.results(outputs),
        {"rank": rank, "world": RANKS},
    )
    (folder / f"{rank}.safetensors").write_bytes(data)
    torch.save((outputs.terms, outputs.gradients), folder / f"{rank}.pt")
    parallel.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank wrote: its outputs, and a recorded step."""
    path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, args=(path,), nprocs=RANKS)
    return path


@pytest.mark.jobs
def test_the_ranks_sum_to_one_process(folder: Path) -> None:
    own, batch = whole_step()
    masked = batch.masks.sum(dim=(0, 2)).view(RANKS, -1).sum(dim=1).tolist()
    assert len(set(masked)) == RANKS
    assert 0 in masked
    _, alone, _ = compute(own, batch)
    assert set(alone.terms) == {"dino_global", "dino_local", "ibot", "koleo", "gram", "total"}
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    for kind, expected in enumerate((alone.terms, alone.gradients)):
        for name, tensor in expected.items():
            assert tensor.dtype == torch.float64
            difference = (sum(rank[kind][name] for rank in ranks) - tensor).norm()
            assert difference <= 1e-6 * tensor.norm(), name


@pytest.mark.jobs
def test_each_rank_is_replayed_alone(folder: Path) -> None:
    for rank in range(RANKS):
        recorded = recording.read(f"{folder}/{rank}.safetensors")
        rows = replay.compare(recorded.results, replay.replay(recorded))
        assert [row for row in rows if row.difference() > 1e-12] == []
        assert {row.name for row in rows} >= {"terms.total", "terms.gram", "gradient_norms.backbone"}
        without = replace(recorded, inputs=replace(recorded.inputs, answers=None))
        assert replay.replay(without)["terms.total"] != pytest.approx(recorded.results["terms.total"], rel=1e-9)
