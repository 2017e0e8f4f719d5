"""Parallel settings never change the numbers beyond rounding: real torchrun jobs, the same batches, every layout.

The phase has all that could tell layouts apart: drop path, RoPE augmentation, unequal masks, KoLeo groups, Gram, two
resolutions, clipping, and a learning rate at which the loss falls.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from model import contract, sealed
from model.contract import Attempt, Cause
from orchestrator import progress
from tests.model import test_train as tiny
from tests.model.standin import killed_within
from tests.model.test_train import (
    Ran,
    after_step as once_after_step,
    assert_same_tensors,
    describe,
    images,
    phase_settings,
    ref,
    train,
)

__all__ = ["images"]

STEPS = 20
HEAD = {**tiny.HEAD, "prototypes": 48}
MODEL: dict[str, Any] = {
    "backbone": {**tiny.MODEL["backbone"], "dim": 36, "heads": 3, "drop_path": 0.3},
    "dino_head": HEAD,
    "ibot_head": HEAD,
}


@dataclass(frozen=True)
class Layout:
    processes: int
    parallel: dict[str, Any]
    micro_batch: int = 48

    def __str__(self) -> str:
        ways = "-".join(str(value) for value in self.parallel.values()) or "whole"
        return f"{self.processes}-{ways}-{self.micro_batch}"


ALONE = Layout(1, {})
FSDP, HSDP = {"shard": "fsdp"}, {"shard": "hsdp", "shard_size": 2}
LAYOUTS = [
    Layout(1, {}, 8),
    Layout(2, {}),
    Layout(2, FSDP, 12),
    Layout(3, FSDP),
    Layout(4, HSDP, 4),
    Layout(4, {}, 4),
    Layout(1, {"activation_checkpointing": "full"}),
    Layout(2, {**FSDP, "activation_checkpointing": "selective"}, 8),
]


def settings(images: Path, layout: Layout, compute: str) -> dict[str, Any]:
    return phase_settings(
        images,
        kind="gram", gram_teacher="pretrain@8", steps=STEPS, parallel=layout.parallel, precision={"compute": compute},
        optim={
            "batch_size": 48, "group_size": 4, "micro_batch": layout.micro_batch, "lr": 0.0007, "beta2": 0.98,
            "layer_decay": 0.9,
        },
        losses={
            "koleo": {"group_size": 4}, "gram": {"weight": 1.0}, "dino": {"teacher_temp": 0.01, "student_temp": 0.03}
        },
        augment={"jitter": 0.0, "grayscale": 0.0, "blur_global_1": 0.0, "blur_local": 0.0, "solarize_global_2": 0.0},
        ema=0.996,
        crops={
            "resolutions": [
                {"global_size": 32, "local_size": 16, "gram_size": 48}, {"global_size": 40, "local_size": 16}
            ],
            "local_count": 2,
        },
        checkpoints={"every": 7, "keep_last": 9},
    )  # fmt: skip


def run(folder: Path, images: Path, layout: Layout, compute: str, number: int = 1, **changes: Any) -> Ran:
    attempt = describe(
        folder, images, number, phase="gram", model=MODEL, settings=settings(images, layout, compute),
        processes_per_node=layout.processes, **changes,
    )  # fmt: skip
    return train(attempt, layout.processes)


def curve(ran: Ran) -> dict[int, float]:
    assert ran.end().cause is Cause.DONE, ran.log()
    return {step.step: step.metrics["loss"] for step in progress.steps(ran.attempt.run_dir, ran.attempt.attempt)}


def furthest(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest relative difference over the steps that both have."""
    common = one.keys() & other.keys()
    assert common
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in common)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Ran]:
    """One process, nothing cut, by precision."""
    return {
        compute: run(tmp_path_factory.mktemp(compute), images, ALONE, compute) for compute in ("fp64", "fp32", "bf16")
    }


@pytest.mark.jobs
@pytest.mark.parametrize("compute", ["fp64", "fp32"])
def test_the_loss_falls(alone: dict[str, Ran], compute: str) -> None:
    losses = curve(alone[compute])
    assert sorted(losses) == list(range(1, STEPS + 1))
    first, last = (sum(losses[step] for step in steps) for steps in ((1, 2, 3), (18, 19, 20)))
    assert last < 0.95 * first


@pytest.mark.jobs
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_same_curve_in_float64(
    alone: dict[str, Ran], tmp_path: Path, images: Path, layout: Layout
) -> None:
    assert furthest(curve(alone["fp64"]), curve(run(tmp_path, images, layout, "fp64"))) < 1e-9


@pytest.mark.jobs
@pytest.mark.parametrize(
    "layout", [Layout(1, {}, 8), Layout(2, {}), Layout(4, {}, 4), Layout(3, FSDP, 8), Layout(4, HSDP, 4)], ids=str
)
def test_and_in_single_precision_up_to_its_rounding(
    alone: dict[str, Ran], tmp_path: Path, images: Path, layout: Layout
) -> None:
    assert furthest(curve(alone["fp32"]), curve(run(tmp_path, images, layout, "fp32"))) < 1e-4


@pytest.mark.jobs
def test_products_in_bf16_of_gathered_copies_leave_the_weights_in_fp32(
    alone: dict[str, Ran], tmp_path: Path, images: Path
) -> None:
    sharded = run(tmp_path, images, Layout(2, FSDP), "bf16")
    assert furthest(curve(alone["bf16"]), curve(sharded)) < 0.02
    stored = sealed.load(ref(sharded, STEPS), "student") | sealed.load(ref(sharded, STEPS), "optimizer")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float32"}


@pytest.mark.jobs
def test_saved_on_four_and_resumed_on_two_and_three(alone: dict[str, Ran], tmp_path: Path, images: Path) -> None:
    four = run(tmp_path, images, Layout(4, FSDP), "fp64")
    shards = sealed.read_manifest(ref(four, 14)).parts["student"]
    assert [Path(file.path).name for file in shards] == [f"student-{n:05d}-of-00004.safetensors" for n in range(4)]
    expected = curve(alone["fp64"])
    for number, layout in enumerate((Layout(2, FSDP, 8), Layout(3, FSDP), Layout(1, {}), Layout(4, HSDP)), 2):
        resumed = run(tmp_path, images, layout, "fp64", number, resume=[ref(four, 14)])
        assert sorted(curve(resumed)) == list(range(15, STEPS + 1))
        assert furthest(expected, curve(resumed)) < 1e-9


@pytest.mark.jobs
def test_a_rank_killed_among_its_micro_batches_and_resumed_ends_bit_for_bit(tmp_path: Path, images: Path) -> None:
    layout = Layout(2, FSDP, 4)
    untouched = run(tmp_path / "untouched", images, layout, "fp32")
    attempt = describe(
        tmp_path / "killed", images, phase="gram", model=MODEL, settings=settings(images, layout, "fp32"),
        processes_per_node=2,
    )  # fmt: skip
    killed = train(attempt, 2, trainer=killed_within.__name__)
    assert killed.ends[1] is None
    assert max(killed.steps()) in (killed_within.STEP - 2, killed_within.STEP - 1)
    newest = max(killed.sealed())
    assert newest == 7
    resumed = run(tmp_path / "killed", images, layout, "fp32", 2, resume=[ref(killed, newest)])
    assert sorted(curve(resumed)) == list(range(newest + 1, STEPS + 1))
    assert_same_tensors(ref(untouched, STEPS), ref(resumed, STEPS))


@pytest.mark.jobs
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU: install g++")
def test_compiled_blocks_compute_the_same(alone: dict[str, Ran], tmp_path: Path, images: Path) -> None:
    compiled = run(tmp_path, images, Layout(2, {**FSDP, "compile": True}), "fp32")
    assert furthest(curve(alone["fp32"]), curve(compiled)) < 1e-4


@pytest.mark.jobs
def test_two_thousand_steps_take_no_more_memory_than_a_few_hundred(tmp_path: Path, images: Path) -> None:
    attempt = describe(
        tmp_path, images, phase="gram", model=MODEL, processes_per_node=1,
        settings={**settings(images, ALONE, "fp32"), "steps": 2000, "checkpoints": {"every": 2000},
                  "optim": {"batch_size": 8, "group_size": 4, "lr": 0.0007}},
    )  # fmt: skip
    sizes: dict[int, int] = {}

    def watch() -> None:
        for step in (500, 1000, 1500, 1950):
            once_after_step(attempt, step, lambda step=step: sizes.update({step: resident(attempt)}))()

    ran = train(attempt, 1, watch, seconds=400)
    assert ran.end().cause is Cause.DONE, ran.log()
    assert max(sizes.values()) - sizes[500] < 3 << 20, sizes


def resident(attempt: Attempt) -> int:
    """Bytes that the trainer has of its own."""
    status = Path(f"/proc/{contract.pid_file(attempt.launch_name, 0).read_text()}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
