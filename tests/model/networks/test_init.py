"""Initial weights: their distributions, and that nothing but (seed, name, row) shows in them."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from model import config
from model.networks.heads import ProjectionHead
from model.networks.init import Normal, create, fill, initial_rules
from model.networks.text import LogitScale, TextTower
from model.networks.vit import VisionTransformer

SMALL = config.Backbone(arch="custom", dim=64, depth=2, heads=2, patch_size=4)


def vit(seed=0, settings=SMALL, name="backbone"):
    return create(lambda: VisionTransformer(settings), seed, name).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_values():
    weights = vit()
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "storage_tokens", "cls_token"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.25), name
    assert weights["blocks.0.mlp.fc2.weight"].mean().abs() < 1e-3
    bound = (3 * 4 * 4) ** -0.5
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert 0.9 * bound < weights[name].abs().max() <= bound
        assert weights[name].min() < 0 < weights[name].max()
    for name in ("mask_token", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias", "norm.bias"):
        assert not weights[name].any(), name
    assert (weights["blocks.1.norm2.weight"] == 1).all()
    assert (weights["blocks.0.ls1.gamma"] == 1e-5).all()
    assert weights["blocks.0.attn.qkv.bias_mask"].tolist() == [1.0] * 64 + [0.0] * 64 + [1.0] * 64


def test_heads_and_text():
    head = create(lambda: ProjectionHead(config.Head(prototypes=512, hidden=64, bottleneck=32), 64), 0, "dino_head")
    assert {name: tuple(t.shape) for name, t in head.state_dict().items()} == {
        "mlp.0.weight": (64, 64), "mlp.0.bias": (64,), "mlp.2.weight": (64, 64), "mlp.2.bias": (64,),
        "mlp.4.weight": (32, 64), "mlp.4.bias": (32,), "last_layer.weight": (512, 32),
    }  # fmt: skip
    assert head.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert create(LogitScale, 0, "logit_scale")().item() == pytest.approx(1 / 0.07, rel=1e-6)
    settings = config.TextTower(dim=64, depth=2, heads=2, context=16, vocabulary=300)
    text = create(lambda: TextTower(settings, 96), 0, "text").state_dict()
    for name, std in {
        "token_embedding.weight": 0.02, "positional_embedding": 0.01, "projection.weight": 64**-0.5,
        "blocks.0.attn.qkv.weight": 64**-0.5, "blocks.1.attn.proj.weight": 64**-0.5 * 4**-0.5,
        "blocks.0.mlp.fc1.weight": 128**-0.5, "blocks.1.mlp.fc2.weight": 64**-0.5 * 4**-0.5,
    }.items():  # fmt: skip
        assert text[name].std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize(("arch_dim", "head", "parameters"), [
    (4096, config.Head(prototypes=262144, hidden=8192, bottleneck=512), 239_092_224),
    (4096, config.Head(prototypes=98304, hidden=4096, bottleneck=384), 72_884_608),
])  # fmt: skip
def test_head_sizes_of_the_7b(arch_dim, head, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in ProjectionHead(head, arch_dim).parameters()) == parameters


def test_what_was_built_before_and_torch_seeds_do_not_show():
    first = vit()
    torch.manual_seed(5)
    vit(seed=3)
    assert equal(first, vit())
    deeper = vit(settings=SMALL.model_copy(update={"depth": 4, "registers": 7}))
    for name in ("cls_token", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "patch_embed.proj.weight"):
        assert torch.equal(first[name], deeper[name]), name
    assert torch.equal(first["rope_embed.periods"], deeper["rope_embed.periods"])


def test_seeds_names_and_layers_differ():
    weights = vit()
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[name], vit(seed=1)[name])
    assert not torch.equal(weights[name], vit(name="other")[name])
    assert not torch.equal(weights[name], weights["blocks.1.attn.qkv.weight"])


def test_a_row_depends_on_its_number_alone():
    whole, part = torch.empty(6, 5), torch.empty(2, 5)
    fill(whole, Normal(0.02), 0, "w")
    fill(part, Normal(0.02), 0, "w", first_row=3)
    assert torch.equal(whole[3:5], part)
    wider = torch.empty(6, 9)
    fill(wider, Normal(0.02), 0, "w")
    assert torch.equal(wider[:, :5], whole)
    assert len(whole.unique()) == 30


DIGEST = """
import hashlib
from model import config
from model.networks.init import create
from model.networks.vit import VisionTransformer
settings = config.Backbone(arch="custom", dim=64, depth=2, heads=2, patch_size=4)
weights = create(lambda: VisionTransformer(settings), 0, "backbone").state_dict()
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest())
"""


@pytest.mark.jobs
def test_another_process_makes_the_same_weights():
    own = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in vit().values())).hexdigest()
    other = subprocess.run([sys.executable, "-P", "-c", DIGEST], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == own


def test_a_parameter_without_a_rule_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

    with pytest.raises(TypeError, match="Odd: no initial value for weight"):
        initial_rules(Odd())
