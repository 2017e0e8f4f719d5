"""Three whole updates of student, teacher, Gram teacher and AdamW, against the oracle: 1e-9 in float64.

Gram on, drop path 0.3, RoPE rescaling, KoLeo in groups, masks of unequal size, two micro-batches, moving schedules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import optim
from model.objectives.base import Moment
from tests.model.oracle.engine import (
    BATCH,
    DEPTH,
    LOCALS,
    TERMS,
    Case,
    assert_close,
    assert_same_state,
    assert_same_steps,
    backbone as backbone_settings,
    batch,
    copied,
    engine,
    engine_step,
    oracle_step,
)
from tests.model.oracle.network import HEADS, backbone

GROUP, STEPS = 4, 3
DROP_PATH, RESCALE = 0.3, 2.0

HEAD = {"hidden": 16, "bottleneck": 8}
MODEL = {
    "backbone": backbone_settings(
        registers=2, drop_path=DROP_PATH, rope_rescale=RESCALE, layer_scale=0.5, untie_local_cls_norm=True
    ),
    "dino_head": {"prototypes": 12, **HEAD},
    "ibot_head": {"prototypes": 10, **HEAD},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "lr": {"start": 1e-3, "peak": 4e-3, "end": 1e-3, "warmup_steps": 1},
    "weight_decay": {"peak": 0.04, "end": 0.4},
    "ema": {"peak": 0.8, "end": 1.0, "decay": "linear"},
    "teacher_temp": {"start": 0.04, "peak": 0.07, "warmup_steps": 2},
    "local_weight": {"start": 1.0, "peak": 0.5, "warmup_steps": 3, "warmup": "cosine"},
    "gram_weight": {"start": 1.0, "peak": 2.0, "warmup_steps": 2, "warmup": "cosine"},
}
ORACLE: dict[str, Any] = {
    **SCHEDULES, "clip": 0.3, "koleo_group": GROUP, "betas": (0.9, 0.99), "layer_decay": 0.9, "patch_lr": 0.2,
    "frozen_steps": 1, "refresh_every": 2, "rates": [DROP_PATH] * DEPTH, "rescale": RESCALE,
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


CASE = Case(MODEL, PHASE, ORACLE)


def test_three_steps() -> None:
    assert set(engine_step(*started(CASE), CASE, 0)) == TERMS
    for step in range(STEPS):
        assert len(set(batch(CASE, step).masks.sum(dim=2).flatten().tolist())) > 3
    assert_same_steps(CASE, STEPS)


def started(case: Case) -> tuple[Any, torch.optim.Optimizer]:
    own = engine(case)
    return own, optim.build(own.networks().trained, own.settings.optim)


def test_two_steps_with_centres() -> None:
    """Of version 1: centres in the place of Sinkhorn-Knopp, which follow the scores from zero."""
    centering = {"centering": "centering", "center_momentum": 0.8}
    phase = {**PHASE, "losses": {**PHASE["losses"], **centering}}
    assert_same_steps(Case(MODEL, phase, {**ORACLE, "center_momentum": 0.8}), 2)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Along a random direction of all weights: central differences of the whole loss, with every term in it."""
    own, moment, one = engine(CASE), Moment(1, STEPS, 31), batch(CASE, 1)
    parameters = [p for network in own.networks().trained.values() for p in network.parameters()]
    generator = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    targets = own.targets(one, moment)

    def loss(along: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, way, strict=True):
                parameter.add_(direction, alpha=along)
        total: torch.Tensor = own.loss(one, targets, moment)["total"]
        return total

    loss(0.0).backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, way, strict=True) if p.grad is not None)
    step = 1e-6
    after, before = loss(step).item(), loss(-2 * step).item()
    assert slope == pytest.approx((after - before) / (2 * step), rel=1e-6)


def test_the_comparison_would_see_a_small_fault() -> None:
    """The oracle with a momentum that is off by 1e-6 is told from the engine."""
    own, optimizer = started(CASE)
    state = copied(own)
    engine_step(own, optimizer, CASE, 0)
    oracle_step(CASE, state, 0, ema={"peak": 0.8 + 1e-6})
    with pytest.raises(AssertionError, match="teacher"):
        assert_same_state(own, optimizer, state, 0)


def test_a_plain_forward_of_a_wide_image() -> None:
    own = engine(CASE)
    image = torch.randn(3, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cls, patches = backbone(copied(own).teacher["backbone"], image)
    said = own.networks().frozen["teacher_backbone"].features(image[None])
    assert_close(said.cls[0], cls, "CLS")
    assert_close(said.patches[0], patches, "patches")


def test_the_wavelengths() -> None:
    own, width = engine(CASE), 16 // HEADS
    periods = [100.0 ** (2 * i / (width / 2)) for i in range(width // 4)]
    assert own.student.backbone.rope_embed.periods.tolist() == pytest.approx(periods, rel=1e-6)
