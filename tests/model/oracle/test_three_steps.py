"""Three whole updates of student, teacher, Gram teacher and AdamW, against the oracle: 1e-9 in float64.

Gram on, drop path 0.3, RoPE rescaling, KoLeo in groups, masks of unequal size, two micro-batches, moving schedules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import config, optim
from model.data.batch import SslBatch
from model.data.masks import group_masks
from model.objectives.base import Moment
from model.objectives.build import build
from tests.model.oracle import formulas
from tests.model.oracle.network import HEADS, PATCH, Disturbed, backbone
from tests.model.oracle.training import CROPS, Seen, State, train_step

BATCH, GROUP, LOCALS, DEPTH = 8, 4, 2, 2
SEED, ORIGIN, CLOCK, STEPS = 7, "pretrain", 30, 3
DROP_PATH, RESCALE = 0.3, 2.0

HEAD = {"hidden": 16, "bottleneck": 8}
MODEL = {
    "backbone": {
        "arch": "custom", "dim": 16, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "registers": 2,
        "drop_path": DROP_PATH, "rope_rescale": RESCALE, "layer_scale": 0.5, "untie_local_cls_norm": True,
    },
    "dino_head": {"prototypes": 12, **HEAD},
    "ibot_head": {"prototypes": 10, **HEAD},
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "lr": {"start": 1e-3, "peak": 4e-3, "end": 1e-3, "warmup_steps": 1},
    "weight_decay": {"peak": 0.04, "end": 0.4},
    "ema": {"peak": 0.8, "end": 1.0, "decay": "linear"},
    "teacher_temp": {"start": 0.04, "peak": 0.07, "warmup_steps": 2},
    "local_weight": {"start": 1.0, "peak": 0.5, "warmup_steps": 3, "warmup": "cosine"},
    "gram_weight": {"start": 1.0, "peak": 2.0, "warmup_steps": 2, "warmup": "cosine"},
}
ORACLE: dict[str, Any] = {
    **SCHEDULES, "clip": 0.3, "group": GROUP, "batch": BATCH, "koleo": 0.1, "student_temp": 0.1, "betas": (0.9, 0.99),
    "layer_decay": 0.9, "patch_lr": 0.2, "frozen_steps": 1, "refresh_every": 2,
}  # fmt: skip
PHASE: dict[str, Any] = {
    "kind": "gram",
    "gram_teacher": "pretrain@1",
    "steps": STEPS,
    "data": {"path": "images"},
    "checkpoints": {"every": 5},
    "crops": {"resolutions": [{"global_size": 16, "local_size": 8, "gram_size": 24}], "local_count": LOCALS},
    "optim": {
        "batch_size": BATCH, "group_size": GROUP, "accumulate": 2, "lr": SCHEDULES["lr"], "beta2": 0.99, "clip": 0.3,
        "lr_scaling": "sqrt_wrt_1024", "weight_decay": SCHEDULES["weight_decay"], "layer_decay": 0.9,
        "patch_embed_lr": 0.2, "freeze_last_layer_steps": 1,
    },
    "ema": SCHEDULES["ema"],
    "losses": {
        "dino": {"teacher_temp": SCHEDULES["teacher_temp"], "local_weight": SCHEDULES["local_weight"]},
        "koleo": {"weight": 0.1},
        "gram": {"weight": SCHEDULES["gram_weight"], "refresh_every": 2, "refresh_most": 1},
    },
}  # fmt: skip


def engine(**losses: Any) -> Any:
    """The objective in float64, every parameter of every network moved."""
    phase = {**PHASE, "losses": {**PHASE["losses"], **losses}}
    own = build(config.read_phase(phase), config.read(config.Model, MODEL), SEED, ORIGIN)
    generator = torch.Generator().manual_seed(3)
    networks = own.networks()
    for module in (*networks.trained.values(), *networks.frozen.values()):
        module.double()
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise, alpha=0.1)
    return own


def batch(step: int) -> SslBatch:
    generator = torch.Generator().manual_seed(step)

    def crops(count: int, side: int) -> Tensor:
        return torch.randn(count, BATCH, 3, side, side, generator=generator, dtype=torch.float64)

    rng = np.random.default_rng(step)
    masks = [group_masks(rng, CROPS * GROUP, 4, 0.5, (0.1, 0.5)) for _ in range(BATCH // GROUP)]
    by_crop = np.concatenate([mask.reshape(CROPS, GROUP, 16) for mask in masks], axis=1)
    groups = torch.arange(BATCH // GROUP)
    return SslBatch(
        torch.arange(BATCH), groups, crops(2, 16), crops(LOCALS, 8), crops(2, 24), torch.from_numpy(by_crop)
    )


def disturbed(kind: str, copies: int, clock: int) -> dict[tuple[int, int], Disturbed]:
    """The oracle's own draws for every crop, by (crop, image)."""
    groups = list(range(BATCH // GROUP))
    kept, factor = formulas.kept_crops(DROP_PATH, DEPTH, kind, groups, GROUP, copies, SEED, ORIGIN, clock)
    scales = []
    for group in groups:
        drawn = formulas.generator(SEED, f"{ORIGIN}/rope/{kind}", clock, group).uniform(-1, 1, 5)[4]
        scales.append(float(np.float32(RESCALE**drawn)))  # the engine's draws are fp32 tensors
    return {
        (crop, image): Disturbed(
            scale=(scales[image // GROUP],) * 2,
            keeps=tuple(((crop, image) in block[0], (crop, image) in block[1]) for block in kept),
            factor=factor,
        )
        for crop in range(copies)
        for image in range(BATCH)
    }


def seen(one: SslBatch, clock: int) -> Seen:
    assert one.gram_crops is not None
    draws = disturbed("global", CROPS, clock), disturbed("local", LOCALS, clock)
    return Seen(one.global_crops, one.local_crops, one.gram_crops, one.masks, *draws)


def copied(own: Any) -> State:
    networks = own.networks()

    def weights(module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    student = {name: weights(module) for name, module in networks.trained.items()}
    teacher = {name: weights(networks.frozen[f"teacher_{name}"]) for name in student}
    return State(student, teacher, weights(networks.frozen["gram_teacher"]))


def engine_step(own: Any, optimizer: torch.optim.Optimizer, one: SslBatch, moment: Moment) -> dict[str, Tensor]:
    """What the training loop does with a step, on one process."""
    targets, sums, size = own.targets(one, moment), {}, BATCH // own.settings.optim.accumulate
    for start in range(0, BATCH, size):
        terms = own.loss(one.slice(start, start + size), targets.slice(start, start + size), moment)
        terms["total"].backward()
        sums = {name: term.detach() + sums.get(name, 0) for name, term in terms.items()}
    optim.clip(own.networks().trained, own.settings.optim.clip)
    optim.set_step(optimizer, own.settings.optim, moment.step, moment.steps)
    optimizer.step()
    own.after_step(moment)
    optimizer.zero_grad()
    return sums


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == torch.float64, name
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def test_three_steps() -> None:
    own = engine()
    state, optimizer = copied(own), optim.build(own.networks().trained, own.settings.optim)
    for step in range(STEPS):
        one, clock = batch(step), CLOCK + step
        assert len(set(one.masks.sum(dim=2).flatten().tolist())) > 3  # crops differ in how much is hidden
        found = engine_step(own, optimizer, one, Moment(step, STEPS, clock))
        expected = train_step(state, seen(one, clock), ORACLE, step, STEPS)
        assert found.keys() == expected.keys() == {"dino_global", "dino_local", "ibot", "koleo", "gram", "total"}
        for name, term in expected.items():
            assert_close(found[name], term, f"step {step}, {name}")
        assert_same_state(own, optimizer, state, step)


def assert_same_state(own: Any, optimizer: torch.optim.Optimizer, state: State, step: int) -> None:
    now, moments = copied(own), optim.state(optimizer)
    for network, weights in state.student.items():
        for name, tensor in weights.items():
            assert_close(now.student[network][name], tensor, f"step {step}, student {network}.{name}")
            assert_close(now.teacher[network][name], state.teacher[network][name], f"step {step}, teacher {name}")
        for name, tensor in state.first[network].items():
            assert_close(moments[f"exp_avg/{network}.{name}"], tensor, f"step {step}, first moment of {name}")
            assert_close(moments[f"exp_avg_sq/{network}.{name}"], state.second[network][name], f"second of {name}")
    for name, tensor in state.gram_teacher.items():
        assert_close(now.gram_teacher[name], tensor, f"step {step}, Gram teacher {name}")


def test_two_steps_with_centres() -> None:
    """Of version 1: centres in the place of Sinkhorn-Knopp, which follow the scores from zero."""
    own = engine(centering="centering", center_momentum=0.9)
    state, optimizer = copied(own), optim.build(own.networks().trained, own.settings.optim)
    state.centers = {"dino_head": torch.zeros(12).double(), "ibot_head": torch.zeros(10).double()}
    for step in range(2):
        found = engine_step(own, optimizer, batch(step), Moment(step, STEPS, CLOCK + step))
        settings = {**ORACLE, "center_momentum": 0.9}
        expected = train_step(state, seen(batch(step), CLOCK + step), settings, step, STEPS)
        for name, term in expected.items():
            assert_close(found[name], term, f"step {step}, {name}")
        heads = own.state()["teacher_heads"]
        assert_close(heads["dino_center.center"][0], state.centers["dino_head"], "DINO's centre")
        assert_close(heads["ibot_center.center"][0], state.centers["ibot_head"], "iBOT's centre")
    assert_same_state(own, optimizer, state, 1)


def test_the_comparison_would_see_a_small_fault() -> None:
    """The oracle with a momentum that is off by 1e-6 is told from the engine."""
    own = engine()
    state, optimizer = copied(own), optim.build(own.networks().trained, own.settings.optim)
    engine_step(own, optimizer, batch(0), Moment(0, STEPS, CLOCK))
    train_step(state, seen(batch(0), CLOCK), {**ORACLE, "ema": {"peak": 0.8 + 1e-6}}, 0, STEPS)
    with pytest.raises(AssertionError, match="teacher"):
        assert_same_state(own, optimizer, state, 0)


def test_a_plain_forward_of_a_wide_image() -> None:
    own = engine()
    image = torch.randn(3, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cls, patches = backbone(copied(own).teacher["backbone"], image)
    said = own.networks().frozen["teacher_backbone"].features(image[None])
    assert_close(said.cls[0], cls, "CLS")
    assert_close(said.patches[0], patches, "patches")


def test_the_wavelengths() -> None:
    own, width = engine(), 16 // HEADS
    periods = [100.0 ** (2 * i / (width / 2)) for i in range(width // 4)]
    assert own.student.backbone.rope_embed.periods.tolist() == pytest.approx(periods, rel=1e-6)
