"""Counts by formula against the networks themselves: parameters on the meta device, FLOPs on small networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import accounting, config
from model.data.batch import SslBatch
from model.networks.heads import ProjectionHead
from model.networks.text import LogitScale, TextTower, VisionHead
from model.networks.vit import Features, VisionTransformer
from model.objectives.base import Moment
from model.objectives.build import build

PUBLISHED = {
    "vits16": 21_601_152,
    "vits16plus": 28_697_472,
    "vitb16": 85_669_632,
    "vitl16": 303_154_176,
    "vitl16plus": 403_915_776,
    "vith16plus": 840_633_600,
    "vit7b16": 6_716_043_264,
}
"""Of the released networks."""

VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "swiglu": {"ffn": "swiglu", "ffn_ratio": 3.0, "ffn_align": 64},
    "bare": {"registers": 0, "qkv_bias": False, "layer_scale": None, "patch_size": 8, "channels": 1},
    "two norms": {"untie_local_cls_norm": True, "mask_k_bias": False, "ffn_ratio": 2.5},
}


def small(**changes: Any) -> config.Backbone:
    return config.read(config.Backbone, {"arch": "custom", "dim": 32, "depth": 3, "heads": 2, **changes})


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def on_cpu(make: Callable[[], nn.Module]) -> Any:
    """With whatever is in memory for weights: FLOPs do not depend on them."""
    return on_meta(make).to_empty(device="cpu")


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def model(**changes: Any) -> config.Model:
    head = config.Head(prototypes=48, hidden=24, bottleneck=8)
    return config.Model(backbone=small(**changes), dino_head=head, ibot_head=head)


def phase(kind: str, **changes: Any) -> config.AnyPhase:
    common = {
        "kind": kind,
        "steps": 10,
        "data": {"path": "images"},
        "optim": {"batch_size": 8, "group_size": 4, "lr": 1e-3},
        "checkpoints": {"every": 5},
    }
    ssl = {"crops": {"resolutions": [{"global_size": 64, "local_size": 32, "gram_size": 128}], "local_count": 4}}
    own = {
        "pretrain": ssl,
        "gram": {**ssl, "gram_teacher": "pretrain@5"},
        "text": {"vision_tower": "pretrain@final", "image_size": 64, "embed_dim": 40},
    }
    return config.read_phase({**common, **own[kind], **changes})


@pytest.mark.parametrize(("arch", "count"), PUBLISHED.items())
def test_the_released_networks_have_the_published_number_of_parameters(arch: str, count: int) -> None:
    backbone = config.read(config.Backbone, {"arch": arch})
    assert accounting.backbone_parameters(backbone) == count
    assert parameters(on_meta(lambda: VisionTransformer(backbone))) == count


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameters_of_any_backbone(changes: dict[str, Any]) -> None:
    backbone = small(**changes)
    assert accounting.backbone_parameters(backbone) == parameters(on_meta(lambda: VisionTransformer(backbone)))


@pytest.mark.parametrize(
    ("head", "count"),
    [
        (config.Head(prototypes=262144, hidden=8192, bottleneck=512), 239_092_224),
        (config.Head(prototypes=98304, hidden=4096, bottleneck=384), 72_884_608),
    ],
)
def test_the_heads_of_the_7b(head: config.Head, count: int) -> None:
    assert accounting.head_parameters(head, 4096) == count
    assert parameters(on_meta(lambda: ProjectionHead(head, 4096))) == count


@pytest.mark.parametrize("embed_dim", [64, 40], ids=["no projection", "projection"])
def test_what_a_text_phase_trains(embed_dim: int) -> None:
    settings, networks = phase("text", embed_dim=embed_dim), model()
    assert isinstance(settings, config.TextPhase)
    built = on_meta(
        lambda: nn.ModuleList(
            [TextTower(settings.text, embed_dim), VisionHead(settings.head, 32, 2, embed_dim), LogitScale()]
        )
    )
    assert accounting.trained_parameters(networks, settings) == parameters(built)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_flops_of_a_forward(changes: dict[str, Any]) -> None:
    backbone = small(**changes)
    network = on_cpu(lambda: VisionTransformer(backbone))
    images = torch.empty(1, backbone.channels, 64, 64)
    assert accounting.forward_flops(backbone, 64).total == flops(lambda: network.features(images))


def test_flops_of_a_head() -> None:
    head = config.Head(prototypes=48, hidden=24, bottleneck=8)
    network = on_cpu(lambda: ProjectionHead(head, 32))
    assert accounting.head_flops(head, 32) == flops(lambda: network(torch.empty(1, 32)))


def test_flops_of_a_text_step_without_drop_path() -> None:
    head = {"blocks": 2, "drop_path": 0.0}
    settings, networks = phase("text", head=head), model()
    assert isinstance(settings, config.TextPhase)
    tower = on_cpu(lambda: VisionTransformer(networks.backbone))
    text = on_cpu(lambda: TextTower(settings.text, 40))
    vision = on_cpu(lambda: VisionHead(settings.head, 32, 2, 40))
    features = Features(torch.empty(1, 32), torch.empty(1, 4, 32), torch.empty(1, 16, 32))
    frozen = flops(lambda: tower.features(torch.empty(1, 3, 64, 64)))
    trained = flops(lambda: (vision(features), text(torch.zeros(1, 77, dtype=torch.int64))))
    assert accounting.step_flops(networks, settings) == frozen + 4 * trained


def test_a_step_counts_students_three_times_and_teachers_once() -> None:
    """Without drop path, heads aside: 3 x (2 globals + 4 locals) + 2 globals, and 2 Gram views in a Gram phase; less
    one embedding of the student's, as no gradient goes to the images."""
    networks, bare = model(), small()
    globals_, locals_, gram = (accounting.forward_flops(bare, side).total for side in (64, 32, 128))
    embed = 2 * accounting.forward_flops(bare, 64).other + 4 * accounting.forward_flops(bare, 32).other
    no_ibot = {"ibot": {"mask_probability": 0.0}}
    heads = (3 * 6 + 2) * accounting.head_flops(networks.dino_head, 32)
    expected = 3 * (2 * globals_ + 4 * locals_) - embed + 2 * globals_ + heads
    assert accounting.step_flops(networks, phase("pretrain", losses=no_ibot)) == pytest.approx(expected)
    assert accounting.step_flops(networks, phase("gram", losses=no_ibot)) == pytest.approx(expected + 2 * gram)


def test_a_step_of_the_trainer_does_as_many_flops_as_are_counted() -> None:
    """All of its products are: what the counter finds beyond them are those of the losses, and what the student's short
    attention computes again in backward: the scores twice, and once what they gather."""
    networks, images = model(), 8
    settings = phase("gram", losses={"koleo": {"weight": 0.0}})
    assert isinstance(settings, config.SslPhase)
    objective = build(settings, networks, 0, "pretrain")
    masks = torch.zeros(2, images, 16, dtype=torch.bool)
    masks[..., :2], masks[0, :, 2] = True, True  # 40, where 2 x 8 x 16 x .5 x .3 = 38.4 are expected
    crops = {
        name: torch.randn(n, images, 3, side, side) for name, n, side in (("g", 2, 64), ("l", 4, 32), ("t", 2, 128))
    }
    batch = SslBatch(torch.arange(images), torch.arange(2), crops["g"], crops["l"], crops["t"], masks)
    moment = Moment(0, 10, 0)
    with FlopCounterMode(display=False) as counter:
        objective.loss(batch, objective.targets(batch, moment), moment)["total"].backward()
    dino = 2 * 2 * (2 + 4) * 48 * images * 2  # pairs of crops, and the gradient to the student's
    gram = 2 * 2 * images * 16 * 16 * 32 * 4  # student's and teacher's similarities, and the gradient to both factors
    sequences = [(2 * images, 16 + 5), (4 * images, 4 + 5)]  # patches, CLS and registers
    again = 3 * 3 * sum(count * 2 * tokens**2 * 32 for count, tokens in sequences)  # in each of three blocks
    more_masked = (40 - 38.4) * 4 * accounting.head_flops(networks.dino_head, 32)
    counted = accounting.step_flops(networks, settings) * images
    assert counter.get_total_flops() == pytest.approx(counted + dino + gram + again + more_masked, rel=1e-3)


def test_recomputation_costs_one_more_forward_of_the_students_blocks_and_drop_path_saves_its_share() -> None:
    plain = accounting.step_flops(model(), phase("pretrain"))
    again = accounting.step_flops(model(), phase("pretrain", parallel={"activation_checkpointing": "full"}))
    dropped = accounting.step_flops(model(drop_path=0.5), phase("pretrain"))
    blocks = 2 * accounting.forward_flops(small(), 64).blocks + 4 * accounting.forward_flops(small(), 32).blocks
    assert again - plain == pytest.approx(blocks)
    assert plain - dropped == pytest.approx(1.5 * blocks)
    ramp = accounting.step_flops(model(drop_path=0.5, drop_path_depth="linear"), phase("pretrain"))
    assert plain - ramp == pytest.approx(0.75 * blocks)  # from 0 in the first block to 0.5 in the last


def test_resolutions_count_by_their_ratio() -> None:
    def step(*resolutions: dict[str, Any]) -> float:
        return accounting.step_flops(model(), phase("pretrain", crops={"resolutions": list(resolutions)}))

    small_, large = {"global_size": 32, "local_size": 16}, {"global_size": 64, "local_size": 32}
    mixed = step({**small_, "ratio": 0.6}, {**large, "ratio": 0.2})
    assert mixed == pytest.approx(0.75 * step(small_) + 0.25 * step(large))


def test_bytes_of_the_7bs_checkpoints_are_those_people_report() -> None:
    """107 GB, and 134 GB with a Gram teacher, for the backbone alone; the heads add 5 GB."""
    head = {"prototypes": 262144, "hidden": 8192, "bottleneck": 512}
    networks = config.read(config.Model, {"backbone": {"arch": "vit7b16"}, "dino_head": head, "ibot_head": head})
    heads = 4 * accounting.heads_parameters(networks)
    pretrain, gram = (accounting.checkpoint_bytes(networks, phase(kind)) for kind in ("pretrain", "gram"))
    assert round((sum(pretrain.values()) - 4 * heads) / 1e9) == 107
    assert round((sum(gram.values()) - 4 * heads) / 1e9) == 134
    assert round(gram["gram_teacher"] / 1e9) == 27
