"""Parameter groups, learning rates and refreshes against numbers that were read off the released code at work."""

from __future__ import annotations

import pytest
import torch

from model import config, optim, schedules
from model.networks.heads import ProjectionHead
from model.networks.vit import VisionTransformer
from model.objectives.base import Moment
from model.objectives.build import build

BLOCK_MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
BLOCK_REST = (
    "norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias",
    "mlp.fc1.bias", "mlp.fc2.bias", "ls2.gamma",
)  # fmt: skip
TOKENS = ("cls_token", "storage_tokens", "mask_token")


def settings(**values: object) -> config.Optim:
    return config.read(config.Optim, {"batch_size": 1024, "group_size": 8, "lr": 1.0, **values})


def placed(optimizer: optim.Optimizer) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by parameter."""
    return {name: (group.lr, group.weight_decay) for group in optimizer.groups for name in group.parameters}


def test_groups_of_a_released_vit_s() -> None:
    """175 parameters in 28 groups, the head's in 3; decay 0.98 over 12 blocks, the patch embedding times 0.2."""
    choice = settings(layer_decay=0.98, patch_embed_lr=0.2, weight_decay=0.04)
    narrow = {"arch": "vits16", "dim": 24, "heads": 2}  # 12 blocks, as narrow as can be: groups do not depend on it
    backbone = VisionTransformer(config.read(config.Backbone, narrow))
    head = ProjectionHead(config.Head(prototypes=8, hidden=8, bottleneck=4), 24)
    alone = optim.build({"backbone": backbone}, choice)
    assert len(alone.groups) == 28
    assert len(optim.build({"dino_head": head}, choice).groups) == 3
    optim.set_step(alone, choice, 0, 10)
    expected = dict.fromkeys(TOKENS, (0.76902, 0.04))
    expected |= {"patch_embed.proj.weight": (0.15380, 0.04), "patch_embed.proj.bias": (0.15380, 0.0)}
    expected |= {"norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0)}
    for block in range(12):
        lr = 0.98 ** (12 - block)
        expected |= {f"blocks.{block}.{name}": (lr, 0.04) for name in BLOCK_MATRICES}
        expected |= {f"blocks.{block}.{name}": (lr, 0.0) for name in BLOCK_REST}
    found = {name.removeprefix("backbone."): values for name, values in placed(alone).items()}
    assert len(found) == 175
    assert found == {name: pytest.approx(values, abs=5e-6) for name, values in expected.items()}


def test_groups_that_only_other_versions_have() -> None:
    """The 7B's norm of local crops, learnt positions (a token's rate), and prototypes with lengths of their own."""
    choice = settings(layer_decay=0.9, patch_embed_lr=0.2, weight_decay=0.04, freeze_last_layer_steps=5)
    size = {"dim": 24, "depth": 2, "heads": 2, "layer_scale": 1.0}
    learned = {"arch": "custom", **size, "positions": "learned", "position_grid": 2, "ffn": "swiglu_fused"}
    untied = {"arch": "custom", **size, "untie_local_cls_norm": True}
    head = config.Head(prototypes=8, hidden=8, bottleneck=4, weight_norm="learned")
    for values, name, expected in (
        (untied, "local_cls_norm.weight", (1.0, 0.0)),
        (learned, "pos_embed", (0.9**3, 0.04)),
        (learned, "blocks.0.mlp.w12.weight", (0.9**2, 0.04)),
        (learned, "blocks.0.mlp.w12.bias", (0.9**2, 0.0)),
    ):
        networks = {"backbone": VisionTransformer(config.read(config.Backbone, values))}
        optimizer = optim.build(networks, choice)
        optim.set_step(optimizer, choice, 0, 10)
        assert placed(optimizer)[f"backbone.{name}"] == pytest.approx(expected), name
    optimizer = optim.build({"dino_head": ProjectionHead(head, 24)}, choice)
    for step, rate in ((4, 0.0), (5, 1.0)):
        optim.set_step(optimizer, choice, step, 10)
        for name in ("weight_g", "weight_v"):
            assert placed(optimizer)[f"dino_head.last_layer.{name}"] == (rate, 0.04)


@pytest.mark.parametrize(("batch", "peak", "expected"), [(4096, 5e-5, 4e-4), (2048, 1.25e-5, 7.0711e-5)])
def test_learning_rates_of_the_7b(batch: int, peak: float, expected: float) -> None:
    """Pretraining's is 8 times what its configuration says, high resolution's 5.66 times."""
    choice = settings(batch_size=batch, lr=peak, lr_scaling="sqrt_wrt_1024")
    assert schedules.learning_rate(choice, 0, 10) == pytest.approx(expected, rel=1e-5)


def test_the_7b_refreshes_its_gram_teacher_three_times() -> None:
    """Every 10,000 steps of the Gram phase, which has 40,000; that the copy is one, the oracle's three steps see."""
    head = {"prototypes": 8, "hidden": 8, "bottleneck": 4}
    model = {"backbone": {"arch": "custom", "dim": 8, "depth": 1, "heads": 1}, "dino_head": head, "ibot_head": head}
    phase = {
        "kind": "gram", "steps": 40_000, "data": {"path": "images"}, "gram_teacher": "pretrain@1",
        "checkpoints": {"every": 5}, "crops": {"resolutions": [{"global_size": 32, "local_size": 16}]},
        "optim": {"batch_size": 8, "group_size": 8, "lr": 1e-3}, "ema": 0.0,
        "losses": {"gram": {"refresh_every": 10_000, "refresh_most": 3}},
    }  # fmt: skip
    own = build(config.read_phase(phase), config.read(config.Model, model), 0, "pretrain")
    gram_teacher, student = (own.step_networks().gram_teacher, own.step_networks().student.backbone)
    refreshed = []
    for step in (0, 9_998, 9_999, 10_000, 19_998, 19_999, 29_999, 30_000, 39_999):
        with torch.no_grad():
            student.cls_token.add_(1.0)
        own.after_step(Moment(step, 40_000, step), torch.tensor(True))
        if torch.equal(gram_teacher.cls_token, student.cls_token):
            refreshed.append(step + 1)
    assert refreshed == [10_000, 20_000, 30_000]
