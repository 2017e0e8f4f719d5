"""fp8 products by torch's own scaled product, which a CPU has too, only slowly; speed needs an H100."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import config
from model.networks import fp8
from model.networks.init import create
from model.networks.vit import View, VisionTransformer

SETTINGS = config.Backbone(arch="custom", dim=64, depth=2, heads=2, patch_size=8, ffn="swiglu", layer_scale=1.0)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_keep_their_own_scale() -> None:
    x = noise(6, 32) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None]
    rounded, scale = fp8.quantise(x.bfloat16())
    assert rounded.dtype == torch.float8_e4m3fn
    assert scale.shape == (6, 1)
    back = rounded.float() * scale
    relative = (back - x).norm(dim=1)[:5] / x.norm(dim=1)[:5]
    assert relative.max() < 0.04
    assert back[5].eq(0).all()


def test_output_and_input_gradient_are_rounded_and_the_weight_gradient_is_not() -> None:
    x, weight = noise(40, 64).bfloat16().requires_grad_(), noise(48, 64, seed=1).bfloat16().requires_grad_()
    dy = noise(40, 48, seed=2).bfloat16()
    y = fp8.Fp8Product.apply(x, weight)
    y.backward(dy)
    for found, exact in ((y, x.float() @ weight.float().T), (x.grad, dy.float() @ weight.float())):
        error = (found.float() - exact).norm() / exact.norm()
        assert 0.005 < error < 0.06  # e4m3 has three bits of mantissa
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float(), dy.float().T @ x.detach().float(), rtol=0.01, atol=0.05)


def test_a_converted_block_keeps_its_names_and_about_its_output() -> None:
    def convert(network: nn.Module) -> None:
        for block in network.blocks:
            fp8.convert(block)

    plain = create(lambda: VisionTransformer(SETTINGS), 0, "backbone")
    converted = create(lambda: VisionTransformer(SETTINGS), 0, "backbone", convert)
    assert plain.state_dict().keys() == converted.state_dict().keys()
    images = noise(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (network([View(images)])[0].patches.float() for network in (plain, converted))
    assert 0 < (one - other).norm() / one.norm() < 0.05
    other.sum().backward()
    assert all(parameter.grad is not None for parameter in converted.blocks.parameters())


def test_widths_that_cannot_are_named() -> None:
    with pytest.raises(ValueError, match=r"precision.fp8: proj is 36 x 32 wide, and fp8 needs multiples of 16"):
        fp8.convert(nn.ModuleDict({"proj": nn.Linear(36, 32)}))


@pytest.mark.gpu
@pytest.mark.skipif(bool(fp8.missing()), reason=fp8.missing())
def test_on_a_gpu_it_is_the_same_product() -> None:
    left, right = noise(256, 512).bfloat16(), noise(128, 512, seed=1).bfloat16()
    torch.testing.assert_close(
        fp8.product(left.cuda(), right.cuda()).cpu(), fp8.product(left, right), rtol=0.02, atol=0.5
    )
