"""Axial RoPE against its closed forms."""

import math

import pytest
import torch

from model.networks.init import create
from model.networks.rope import RopeDraws, RopeEmbedding, coordinates, periods


def embedding(head_dim=16, base=100.0):
    return create(lambda: RopeEmbedding(head_dim, base), 0, "rope")


def test_periods_of_the_released_models():
    found = periods(64, 100.0)
    assert found.dtype == torch.float32
    assert len(found) == 16
    assert found[0] == 1
    assert found[-1].item() == pytest.approx(100 ** (30 / 32), rel=1e-6)  # 75.0


def test_coordinates_are_patch_centres_each_axis_by_its_own_length():
    found = coordinates(2, 4, torch.device("cpu"))
    assert found[:, 0].tolist() == [-0.5] * 4 + [0.5] * 4
    assert found[:, 1].tolist() == [-0.75, -0.25, 0.25, 0.75] * 2


def test_rotation_is_the_closed_form():
    rotation = embedding()(3, 2, prefix=2)
    x = torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    turned = rotation.turn(x)
    assert torch.equal(turned[:, :, :2], x[:, :, :2])  # CLS and registers have no place
    wavelengths = [100 ** (2 * i / 8) for i in range(4)]
    for patch in range(6):
        y = 2 * (patch // 2 + 0.5) / 3 - 1
        x_axis = 2 * (patch % 2 + 0.5) / 2 - 1
        angles = [2 * math.pi * at / w for at in (y, x_axis) for w in wavelengths]
        for i, angle in enumerate(angles):
            a, b = x[0, 0, 2 + patch, i].item(), x[0, 0, 2 + patch, i + 8].item()
            assert turned[0, 0, 2 + patch, i].item() == pytest.approx(
                a * math.cos(angle) - b * math.sin(angle), abs=1e-5
            )
            assert turned[0, 0, 2 + patch, i + 8].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5
            )


def test_products_depend_on_the_distance_alone():
    rope = embedding()
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(-1, 1, 1, 16, 16)
    rotation = rope(4, 4, prefix=0)
    products = (rotation.turn(q) @ rotation.turn(k).mT)[0, 0].reshape(4, 4, 4, 4)
    torch.testing.assert_close(products[:3, :3, :3, :3], products[1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-4)


def test_draws_shift_and_then_scale_each_crop():
    rope = embedding()
    draws = RopeDraws(torch.tensor([[0.1, -0.2], [0.0, 0.0]]), torch.tensor([[2.0, 0.5], [1.0, 1.0]]))
    rotation = rope(2, 2, prefix=1, draws=draws)
    assert rotation.cos.shape == (2, 1, 5, 16)
    at = (torch.tensor([-0.5, 0.5]) + torch.tensor([0.1, -0.2])) * torch.tensor([2.0, 0.5])  # patch 1: top right
    expected = (2 * math.pi * at[:, None] / rope.periods).flatten()
    torch.testing.assert_close(rotation.cos[0, 0, 2, :8], expected.cos())
    torch.testing.assert_close(rotation.sin[0, 0, 2, 8:], expected.sin())
    plain = rope(2, 2, prefix=1)
    torch.testing.assert_close(rotation.cos[1], plain.cos[0])
    chosen = rotation.select(torch.tensor([1]))
    assert torch.equal(chosen.sin, rotation.sin[1:])
    assert plain.select(torch.tensor([1])) is plain


def test_turns_bf16_in_fp32():
    rotation = embedding()(14, 14, prefix=0)
    x = torch.randn(1, 2, 196, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotation.turn(x)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotation.turn(x.float()).bfloat16())


def test_bf16_is_as_far_off_as_the_released_code():
    exact = create(lambda: RopeEmbedding(64, 100.0), 0, "rope")(14, 14, 5)
    rough = create(lambda: RopeEmbedding(64, 100.0, "bf16"), 0, "rope")(14, 14, 5)
    assert rough.sin.dtype == torch.bfloat16
    assert 0.01 < (rough.sin.float() - exact.sin).abs().max() < 0.025
    x = torch.randn(1, 2, 201, 64)
    assert rough.turn(x).dtype == torch.float32


def test_float64_networks_turn_in_float64():
    rotation = embedding().double()(3, 2, prefix=1)
    assert rotation.cos.dtype == torch.float64
