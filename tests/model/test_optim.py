"""Parameter groups, what a step sets, clipping by network, and AdamW's state by name."""

import math

import pytest
import torch
from torch import nn

from model import config, optim


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)
        self.ls1 = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(4))})


class Backbone(nn.Module):
    """The names of a vision transformer of depth 2, and no more."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.storage_tokens = nn.Parameter(torch.zeros(1, 2, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 4))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4))
        self.last_layer = nn.Linear(4, 8, bias=False)


def networks():
    return {"backbone": Backbone(), "dino_head": Head()}


def settings(**values):
    return config.read(config.Optim, {"batch_size": 1024, "group_size": 8, "lr": 1e-3, **values})


def placed(optimizer):
    """(learning rate, weight decay) by parameter name."""
    return {name: (group.lr, group.weight_decay) for group in optimizer.groups for name in group.parameters}


def test_groups_are_dinov3s():
    choice = settings(layer_decay=0.9, patch_embed_lr=0.2, weight_decay=0.04)
    optimizer = optim.build(networks(), choice)
    assert optim.set_step(optimizer, choice, 0, 10) == {"lr": 1e-3, "weight_decay": 0.04}
    found = placed(optimizer)
    expected = {
        "backbone.cls_token": (0.9**3, True),
        "backbone.storage_tokens": (0.9**3, True),
        "backbone.mask_token": (0.9**3, True),
        "backbone.patch_embed.proj.weight": (0.9**3 * 0.2, True),
        "backbone.patch_embed.proj.bias": (0.9**3 * 0.2, False),
        "backbone.blocks.0.fc.weight": (0.9**2, True),
        "backbone.blocks.0.norm1.weight": (0.9**2, False),
        "backbone.blocks.1.fc.weight": (0.9, True),
        "backbone.blocks.1.fc.bias": (0.9, False),
        "backbone.blocks.1.ls1.gamma": (0.9, False),
        "backbone.norm.weight": (1.0, False),
        "dino_head.mlp.0.weight": (1.0, True),
        "dino_head.last_layer.weight": (1.0, True),
    }
    for name, (multiplier, decays) in expected.items():
        assert found[name] == pytest.approx((1e-3 * multiplier, 0.04 * decays)), name
    assert len(found) == sum(len(list(network.parameters())) for network in networks().values())


def test_blocks_of_another_network_do_not_decay():
    choice = settings(layer_decay=0.5)
    optimizer = optim.build({"text": Backbone()}, choice)
    optim.set_step(optimizer, choice, 0, 1)
    assert {lr for lr, _ in placed(optimizer).values()} == {1e-3}


def test_schedules_scaling_and_the_frozen_prototypes():
    lr = {"start": 0.0, "peak": 1e-3, "end": 1e-4, "warmup_steps": 2}
    choice = settings(batch_size=4096, lr=lr, lr_scaling="sqrt_wrt_1024", freeze_last_layer_steps=3)
    optimizer = optim.build(networks(), choice)
    assert optim.set_step(optimizer, choice, 0, 10)["lr"] == 0.0
    assert optim.set_step(optimizer, choice, 2, 10)["lr"] == pytest.approx(8e-3)
    assert placed(optimizer)["dino_head.last_layer.weight"] == (0.0, 0.04)
    assert placed(optimizer)["dino_head.mlp.0.weight"][0] == pytest.approx(8e-3)
    assert optim.set_step(optimizer, choice, 9, 10)["lr"] == pytest.approx(8e-4)
    assert placed(optimizer)["dino_head.last_layer.weight"][0] == pytest.approx(8e-4)


def step(trained, optimizer, choice, number, seed):
    generator = torch.Generator().manual_seed(seed)
    for network in trained.values():
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optim.set_step(optimizer, choice, number, 10)
    optim.update(optimizer, torch.tensor(True))


def test_updates_are_adamws():
    trained, choice = {"dino_head": Head()}, settings(beta1=0.8, beta2=0.9, weight_decay=0.5)
    optimizer = optim.build(trained, choice)
    weight = trained["dino_head"].last_layer.weight
    w, m, v = weight.detach().double().clone(), 0.0, 0.0
    for number in range(3):
        step(trained, optimizer, choice, number, seed=number)
        g = weight.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - 1e-3 * 0.5 * w
        w = w - 1e-3 * (m / (1 - 0.8 ** (number + 1))) / ((v / (1 - 0.9 ** (number + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), w, rtol=0, atol=1e-6)


def test_frozen_prototypes_stay_but_gather_moments():
    trained, choice = networks(), settings(freeze_last_layer_steps=1)
    optimizer = optim.build(trained, choice)
    before = trained["dino_head"].last_layer.weight.detach().clone()
    step(trained, optimizer, choice, 0, seed=0)
    assert torch.equal(trained["dino_head"].last_layer.weight, before)
    assert optim.state(optimizer)["exp_avg/dino_head.last_layer.weight"].abs().sum() > 0
    step(trained, optimizer, choice, 1, seed=1)
    assert not torch.equal(trained["dino_head"].last_layer.weight, before)


def test_networks_are_clipped_apart():
    trained = networks()
    for network, size in (("backbone", 0.01), ("dino_head", 100.0)):
        for parameter in trained[network].parameters():
            parameter.grad = torch.full_like(parameter, size)
    norms = optim.clip(trained, 3.0)
    small = 0.01 * math.sqrt(sum(p.numel() for p in trained["backbone"].parameters()))
    assert norms["backbone"].item() == pytest.approx(small)
    assert trained["backbone"].norm.weight.grad.eq(0.01).all()
    after = torch.stack([p.grad.square().sum() for p in trained["dino_head"].parameters()]).sum().sqrt()
    assert after.item() == pytest.approx(3.0, rel=1e-5)


def test_without_a_limit_the_norm_is_only_measured():
    trained = {"dino_head": Head()}
    for parameter in trained["dino_head"].parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert optim.clip(trained, None)["dino_head"] > 100
    assert trained["dino_head"].last_layer.weight.grad.eq(100.0).all()


def test_state_goes_on_bit_for_bit():
    choice, trained, other = settings(), networks(), networks()
    optimizer = optim.build(trained, choice)
    step(trained, optimizer, choice, 0, seed=0)
    resumed = optim.build(other, choice)
    for name, network in other.items():
        network.load_state_dict(trained[name].state_dict())
    optim.load(resumed, {name: tensor.clone() for name, tensor in optim.state(optimizer).items()})
    step(trained, optimizer, choice, 1, seed=1)
    step(other, resumed, choice, 1, seed=1)
    for name, network in other.items():
        for own, theirs in zip(network.parameters(), trained[name].parameters(), strict=True):
            assert torch.equal(own, theirs)
    after = optim.state(resumed)
    assert all(torch.equal(tensor, after[name]) for name, tensor in optim.state(optimizer).items())
    assert after["step/backbone.cls_token"] == 2


def test_state_is_whole_before_the_first_step():
    names = {f"{network}.{name}" for network, module in networks().items() for name, _ in module.named_parameters()}
    found = optim.state(optim.build(networks(), settings()))
    assert set(found) == {f"{entry}/{name}" for entry in optim.ENTRIES for name in names}


def test_a_state_that_does_not_fit_is_refused_whole():
    optimizer = optim.build(networks(), settings())
    tensors = {name: tensor.clone() + 1 for name, tensor in optim.state(optimizer).items()}
    del tensors["step/backbone.cls_token"]
    tensors["exp_avg/elsewhere"] = torch.zeros(1)
    tensors["exp_avg/backbone.norm.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as caught:
        optim.load(optimizer, tensors)
    for part in ("missing step/backbone.cls_token", "unexpected exp_avg/elsewhere", "norm.bias is [5] and not [4]"):
        assert part in str(caught.value)
    assert all(tensor.eq(0).all() for tensor in optim.state(optimizer).values())


def test_nothing_to_train():
    head = Head().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optim.build({"dino_head": head}, settings())


def test_v1_clips_each_tensor_apart():
    trained = {"dino_head": Head()}
    for number, parameter in enumerate(trained["dino_head"].parameters()):
        parameter.grad = torch.full_like(parameter, 0.001 if number else 100.0)
    whole = torch.stack([p.grad.square().sum() for p in trained["dino_head"].parameters()]).sum().sqrt()
    norms = optim.clip(trained, 3.0, "parameter")
    torch.testing.assert_close(norms["dino_head"], whole)
    first, *others = trained["dino_head"].parameters()
    torch.testing.assert_close(first.grad.norm(), torch.tensor(3.0))
    assert all(parameter.grad.eq(0.001).all() for parameter in others)
