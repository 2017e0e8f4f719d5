"""The vision transformer: sizes and names, packed passes, masks, key bias, attention for pictures."""

import pytest
import torch
from torch.nn import functional as F

from model import config
from model.networks.attention import Group, pack, split_heads, unpack
from model.networks.blocks import Kept
from model.networks.init import create
from model.networks.perturb import Layout, Perturbation, perturbation
from model.networks.vit import View, VisionTransformer

RELEASED = {  # parameters, buffer elements, state_dict entries: counted on the released models
    "vits16": (21_601_152, 13_840, 188),
    "vits16plus": (28_697_472, 13_840, 212),
    "vitb16": (85_669_632, 27_664, 188),
    "vitl16": (303_154_176, 73_744, 368),
    "vitl16plus": (403_915_776, 73_744, 416),
    "vith16plus": (840_633_600, 122_896, 552),
    "vit7b16": (6_716_043_264, 32, 610),
}


def small(**changes):
    values = {"arch": "custom", "dim": 32, "depth": 3, "heads": 2, "patch_size": 4, "registers": 2, "layer_scale": 1.0}
    return config.Backbone(**{**values, **changes})


def network(settings, seed=0):
    net = create(lambda: VisionTransformer(settings), seed, "backbone")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zeros and ones, so that every parameter shows
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def images(count, side, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    for name in ("cls", "registers", "patches"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", RELEASED)
def test_has_the_released_size(arch):
    with torch.device("meta"):
        net = VisionTransformer(config.Backbone(arch=arch))
    parameters = sum(p.numel() for p in net.parameters())
    assert (parameters, sum(b.numel() for b in net.buffers()), len(net.state_dict())) == RELEASED[arch]


def test_has_the_released_names():
    with torch.device("meta"):
        found = {name: tuple(t.shape) for name, t in VisionTransformer(small(depth=1)).state_dict().items()}
        swiglu = VisionTransformer(small(depth=1, ffn="swiglu", qkv_bias=False, untie_local_cls_norm=True))
    assert found == {
        "cls_token": (1, 1, 32), "storage_tokens": (1, 2, 32), "mask_token": (1, 32),
        "patch_embed.proj.weight": (32, 3, 4, 4), "patch_embed.proj.bias": (32,), "rope_embed.periods": (4,),
        "blocks.0.norm1.weight": (32,), "blocks.0.norm1.bias": (32,),
        "blocks.0.attn.qkv.weight": (96, 32), "blocks.0.attn.qkv.bias": (96,), "blocks.0.attn.qkv.bias_mask": (96,),
        "blocks.0.attn.proj.weight": (32, 32), "blocks.0.attn.proj.bias": (32,), "blocks.0.ls1.gamma": (32,),
        "blocks.0.norm2.weight": (32,), "blocks.0.norm2.bias": (32,),
        "blocks.0.mlp.fc1.weight": (128, 32), "blocks.0.mlp.fc1.bias": (128,),
        "blocks.0.mlp.fc2.weight": (32, 128), "blocks.0.mlp.fc2.bias": (32,), "blocks.0.ls2.gamma": (32,),
        "norm.weight": (32,), "norm.bias": (32,),
    }  # fmt: skip
    names = swiglu.state_dict()
    assert names["blocks.0.mlp.w1.weight"].shape == (88, 32)  # 2/3 of 128 is 85, rounded up to a multiple of 8
    assert names["blocks.0.mlp.w3.weight"].shape == (32, 88)
    assert {"local_cls_norm.weight", "local_cls_norm.bias"} < names.keys()
    assert not any("qkv.bias" in name for name in names)


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_packed_pass_equals_separate_passes(disturbed):
    settings = small(drop_path=0.5, rope_rescale=2.0, rope_shift=0.1, untie_local_cls_norm=True, ffn="swiglu")
    net = network(settings)

    def noise(kind, copies):
        return perturbation(settings, Layout(kind, [0, 1], 2, copies), 0, "pretrain", 3) if disturbed else None

    masks = torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    views = [
        View(images(8, 16), masks, noise("global", 2)),
        View(images(12, 8), None, noise("local", 3), local=True),
    ]
    for together, view in zip(net(views), views, strict=True):
        close(together, net([view])[0])


def test_a_batch_of_two_groups_equals_each_alone():
    settings = small(drop_path=0.4, rope_rescale=2.0, rope_jitter=1.2, rope_shift=0.1)
    net = network(settings)
    crops = images(2 * 6, 16).reshape(2, 6, 3, 16, 16)

    def run(groups, part):
        noise = perturbation(settings, Layout("global", groups, 3, 2), 0, "pretrain", 7)
        return net([View(crops[:, part].flatten(0, 1), None, noise)])[0]

    whole = run([4, 5], slice(0, 6))
    for groups, part in (([4], slice(0, 3)), ([5], slice(3, 6))):
        alone = run(groups, part)
        torch.testing.assert_close(whole.cls.unflatten(0, (2, 6))[:, part].flatten(0, 1), alone.cls)
        torch.testing.assert_close(whole.patches.unflatten(0, (2, 6))[:, part].flatten(0, 1), alone.patches)


def test_drop_path_scales_the_residual_of_those_it_keeps():
    settings = small(depth=1)
    net = network(settings)
    block, x = net.blocks[0], torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    kept = Kept(torch.tensor([2, 0]), torch.tensor([3, 0]), scale=2.0)
    groups = [Group(4, 5)]
    out = block(pack([x]), groups, [kept]).view_as(x)
    attention = x + 2.0 * (block.ls1.gamma * block.attn(block.norm1(pack([x])), groups)).view_as(x)
    after = torch.stack([attention[0], x[1], attention[2], x[3]])
    ffn = after + 2.0 * block.ls2.gamma * block.mlp(block.norm2(after))
    torch.testing.assert_close(out, torch.stack([ffn[0], after[1], after[2], ffn[3]]))


def test_keeping_all_is_no_drop_path():
    settings = small()
    net = network(settings)
    everything = torch.arange(4).expand(3, 2, 4)
    noise = Perturbation(None, everything, 1.0)
    close(net([View(images(4, 16), None, noise)])[0], net.features(images(4, 16)))


def test_hidden_patches_do_not_show():
    net = network(small())
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 5] = True
    one, other = images(2, 16), images(2, 16)
    other[:, :, 4:8, 4:8] += 1  # patch 5 of the 4 x 4 grid
    close(net([View(one, masks)])[0], net([View(other, masks)])[0])
    assert not torch.allclose(net.features(one).cls, net.features(other).cls)


def test_keys_have_no_bias():
    net = network(small())
    before = net.features(images(2, 16))
    with torch.no_grad():
        net.blocks[0].attn.qkv.bias[32:64] += 5
    close(before, net.features(images(2, 16)))


def test_local_crops_have_a_norm_of_their_own():
    net = network(small(untie_local_cls_norm=True))
    as_global, as_local = net([View(images(2, 8)), View(images(2, 8), local=True)])
    assert not torch.allclose(as_global.cls, as_local.cls)
    assert not torch.allclose(as_global.registers, as_local.registers)
    torch.testing.assert_close(as_global.patches, as_local.patches)


def test_every_parameter_gets_a_gradient():
    net = network(small(untie_local_cls_norm=True, ffn="swiglu"))
    masks = torch.arange(16).expand(2, -1) % 2 == 0
    outs = net([View(images(2, 16), masks), View(images(2, 8), local=True)])
    sum((out.cls.square().sum() + out.patches[..., 0].sum()) for out in outs).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_attention_of_the_last_block_is_what_the_block_does():
    net = network(small(depth=1, registers=3))
    picture = images(2, 16)[..., :8]
    weights = net.cls_attention(picture)
    assert weights.shape == (2, 2, 4, 2)
    packed, groups = net._embed([View(picture)])
    (x,), rotation = unpack(packed, groups), groups[0].rotation
    attn = net.blocks[0].attn
    q, k, v = split_heads(attn.qkv(net.blocks[0].norm1(x)), rotation, attn.heads)
    full = attn.weights(net.blocks[0].norm1(x), rotation, query=0)
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 2))
    torch.testing.assert_close(weights.flatten(2), full[:, :, 4:])
    expected = F.scaled_dot_product_attention(q, k, v)[:, :, 0]
    torch.testing.assert_close((full[:, :, None] @ v)[:, :, 0], expected)


def test_no_registers():
    net = network(small(registers=0))
    assert "storage_tokens" not in net.state_dict()
    assert net.features(images(2, 16)).registers.shape == (2, 0, 32)


def test_refuses_an_image_that_is_not_whole_patches():
    with pytest.raises(ValueError, match="18 x 18 pixels is not whole patches of 4 x 4"):
        network(small()).features(images(1, 18))


def test_autocast_keeps_the_residual_stream_in_fp32():
    net = network(small())
    exact = net.features(images(2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        rough = net.features(images(2, 16))
    assert rough.cls.dtype == torch.float32
    assert 0 < (exact.cls - rough.cls).abs().max() < 0.2


def test_unpack_undoes_pack():
    xs = [torch.randn(2, 3, 4), torch.randn(5, 1, 4)]
    for x, back in zip(xs, unpack(pack(xs), [Group(*x.shape[:2]) for x in xs]), strict=True):
        assert torch.equal(x, back)


def test_rope_may_be_drawn_anew_in_every_block():
    once, anew = small(rope_rescale=2.0), small(rope_rescale=2.0, rope_per_block=True)

    def features(settings):
        noise = perturbation(settings, Layout("global", [0], 2, 2), 0, "pretrain", 0)
        return network(settings)([View(images(4, 16), None, noise)])[0]

    assert not torch.allclose(features(once).cls, features(anew).cls)
    close(features(once.model_copy(update={"depth": 1})), features(anew.model_copy(update={"depth": 1})))
