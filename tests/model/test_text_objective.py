"""Text alignment as the training loop uses it: what it trains, its gradients in any layout, its state."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from model import config
from model.data.batch import PairBatch
from model.networks.init import create
from model.networks.text import TextTower, VisionHead
from model.networks.vit import Features
from model.objectives.base import Moment
from model.objectives.build import build

BACKBONE = {"arch": "custom", "dim": 32, "depth": 2, "heads": 2, "patch_size": 8, "layer_scale": 1.0}
HEAD = {"prototypes": 8, "hidden": 8, "bottleneck": 4}
MODEL = config.Model.model_validate({"backbone": BACKBONE, "dino_head": HEAD, "ibot_head": HEAD})
MOMENT = Moment(step=3, steps=10, clock=3)


def settings(embed_dim=64, compute="fp32", drop_path=0.5):
    return config.TextPhase.model_validate({
        "kind": "text", "steps": 10, "data": {"path": "images"}, "vision_tower": "pretrain@final",
        "optim": {"batch_size": 8, "group_size": 2, "lr": 1e-3}, "checkpoints": {"every": 5},
        "image_size": 16, "embed_dim": embed_dim, "precision": {"compute": compute},
        "text": {"dim": 32, "depth": 2, "heads": 2, "context": 6, "vocabulary": 20},
        "head": {"blocks": 2, "drop_path": drop_path},
    })  # fmt: skip


def objective(**changes):
    made = build(settings(**changes), MODEL, seed=0, origin="text")
    with torch.no_grad():  # LayerScale 1e-5 would hide the vision head's blocks
        for name, parameter in made.networks().trained["vision_head"].named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    return made


def batch(start=0, stop=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 19, (8, 6), generator=generator)
    tokens[:, 4], tokens[:, 5] = 19, 0  # end token, padding
    images = torch.randn(8, 3, 16, 16, generator=generator)
    return PairBatch(torch.arange(8), torch.arange(4), images, tokens).slice(start, stop)


def in_double(made):
    """In fp32 what rounds away differs more than what a micro-batch could get wrong."""
    for network in (*made.networks().trained.values(), *made.networks().frozen.values()):
        network.double()
    return made


def in_double_batch():
    pairs = batch()
    return replace(pairs, images=pairs.images.double())


def gradients(made, pairs, micro):
    """Loss and gradients of one step on the local batch, in micro-batches."""
    targets, total = made.targets(pairs, MOMENT), 0.0
    for first in range(0, len(pairs.images), micro):
        terms = made.loss(pairs.slice(first, first + micro), targets.slice(first, first + micro), MOMENT)
        terms["total"].backward()
        total += terms["contrastive"].item()
    trained = made.networks().trained
    return total, {f"{net}.{name}": p.grad for net, module in trained.items() for name, p in module.named_parameters()}


def same(a, b, **tolerances):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("embed_dim", [64, 48])
def test_micro_batches_change_nothing(embed_dim):
    whole, expected = gradients(in_double(objective(embed_dim=embed_dim)), in_double_batch(), 8)
    cut, found = gradients(in_double(objective(embed_dim=embed_dim)), in_double_batch(), 2)
    assert cut == pytest.approx(whole, rel=1e-12)
    same(found, expected, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())


RANK = """
import sys, torch
sys.path.insert(0, sys.argv[4])
from torch import distributed
from model import parallel
from test_text_objective import gradients, in_double, in_double_batch, objective
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
made = in_double(objective())
loss, found = gradients(made, in_double_batch().slice(4 * rank, 4 * rank + 4), 2)
parallel.reduce_gradients(p for net in made.networks().trained.values() for p in net.parameters())
found["loss"] = parallel.all_reduce_sum(torch.tensor(loss, dtype=torch.float64))
torch.save(found, sys.argv[3] + f".{rank}")
distributed.destroy_process_group()
"""


@pytest.mark.jobs
def test_two_processes_equal_one(tmp_path, request):
    loss, expected = gradients(in_double(objective()), in_double_batch(), 8)
    here = str(request.path.parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK, str(r), str(tmp_path / "meet"), str(tmp_path / "out"), here]
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert found.pop("loss").item() == pytest.approx(loss, rel=1e-12)
        same(found, expected, rtol=1e-9, atol=1e-12)


def test_learns_and_leaves_the_tower_alone():
    made = objective(drop_path=0.0)
    before = {name: tensor.clone() for name, tensor in made.state()["teacher_backbone"].items()}
    parameters = [p for module in made.networks().trained.values() for p in module.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(12):
        losses.append(gradients(made, batch(), 4)[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    same(made.state()["teacher_backbone"], before, rtol=0, atol=0)
    assert made.networks().ema == []
    assert not any(p.requires_grad for p in made.networks().frozen["vision_tower"].parameters())


def test_the_state_goes_out_and_in():
    made = objective(drop_path=0.0)  # whose draws depend on the seed
    other = build(settings(drop_path=0.0), MODEL, seed=1, origin="text")
    state = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in made.state().items()}
    assert state.keys() == {"student", "teacher_backbone"}
    assert {"logit_scale.log", "text_tower.norm.weight", "vision_head.blocks.0.ls1.gamma"} < state["student"].keys()
    for part, tensors in state.items():
        other.load(part, tensors)
    assert gradients(other, batch(), 8)[0] == gradients(made, batch(), 8)[0]
    assert made.frozen_parts() == {"teacher_backbone"}


def test_takes_the_vision_tower():
    made, asked = objective(), []
    tower = {name: tensor + 1 for name, tensor in made.state()["teacher_backbone"].items()}
    made.take("vision_tower", lambda part: asked.append(part) or tower)
    assert asked == ["teacher_backbone"]
    same(made.state()["teacher_backbone"], tower, rtol=0, atol=0)
    with pytest.raises(ValueError, match="takes a vision_tower, not init"):
        made.take("init", lambda part: tower)


def test_a_part_that_does_not_fit_is_refused_whole():
    made = objective()
    tensors = dict(made.state()["teacher_backbone"])
    before = tensors["norm.bias"].clone()
    del tensors["cls_token"]
    tensors |= {"extra": torch.zeros(1), "norm.weight": torch.zeros(3), "norm.bias": tensors["norm.bias"] + 1}
    with pytest.raises(ValueError) as error:
        made.load("teacher_backbone", tensors)
    for words in ("missing cls_token", "unexpected extra", r"norm.weight is [3] and not [32]", "teacher_backbone"):
        assert words in str(error.value)
    assert torch.equal(made.state()["teacher_backbone"]["norm.bias"], before)
    with pytest.raises(ValueError, match="no part gram_teacher"):
        made.load("gram_teacher", {})


def test_bf16_computes_in_bf16_and_loses_in_fp32():
    exact = objective().targets(batch(), MOMENT)
    made = objective(compute="bf16")
    rough = made.targets(batch(), MOMENT)
    assert rough.images.dtype == rough.texts.dtype == torch.float32
    assert 0 < (exact.images - rough.images).abs().max() < 0.1
    terms = made.loss(batch(), rough, MOMENT)
    assert terms["total"].dtype == torch.float32


def test_text_is_causal_and_read_at_the_end_token():
    tower = create(lambda: TextTower(settings().text, 64), 0, "text")
    tokens = batch().tokens
    changed = tokens.clone()
    changed[:, 5] = 3
    assert torch.equal(tower(tokens), tower(changed))  # what follows the end token does not show
    changed = tokens.clone()
    changed[:, 1] = changed[:, 1] % 17 + 1
    assert not torch.allclose(tower(tokens), tower(changed))
    assert not torch.allclose(tower(tokens), tower(tokens[:, [0, 2, 1, 3, 4, 5]]))  # the order does


def test_vision_head_joins_cls_and_mean_patch():
    generator = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(*s, 32, generator=generator) for s in ((2,), (2, 4), (2, 9))))
    head = create(lambda: VisionHead(config.VisionHead(blocks=0), 32, 2, 64), 0, "head")
    expected = torch.cat((head.norm(features.cls), head.norm(features.patches).mean(1)), dim=-1)
    torch.testing.assert_close(head(features), expected)
    assert isinstance(head.projection, torch.nn.Identity)
    assert create(lambda: VisionHead(config.VisionHead(), 32, 2, 48), 0, "head")(features).shape == (2, 48)
    with pytest.raises(ValueError, match="embed_dim must be even"):
        VisionHead(config.VisionHead(), 32, 2, 47)
