"""The factor of a residual branch, multiplied into the branch's last layer: the plain formula and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.networks import fp8
from model.networks.layer_scale import LayerScale


def made(*, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[LayerScale, nn.Linear, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    scale, layer = LayerScale(6, 1.0).to(dtype), nn.Linear(4, 6, bias=bias, dtype=dtype)
    with torch.no_grad():
        for value in (scale.gamma, *layer.parameters()):
            value.copy_(torch.randn(value.shape, generator=rng))
    return scale, layer, torch.randn(2, 5, 4, generator=rng, dtype=dtype, requires_grad=True)


def gradients(y: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), of))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_plain_formula_and_so_are_its_gradients(*, bias: bool) -> None:
    scale, layer, x = made(bias=bias)
    of = (x, scale.gamma, *layer.parameters())
    y, plain = scale(layer, x), layer(x) * scale.gamma
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(gradients(y, *of), gradients(plain, *of))


def test_under_autocast_its_gradients_are_as_near_as_those_of_the_plain_formula() -> None:
    scale, layer, x = made(bias=True, dtype=torch.float32)
    of = (x, scale.gamma, *layer.parameters())
    exact = gradients(layer(x) * scale.gamma, *of)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = scale(layer, x), layer(x) * scale.gamma
    assert y.dtype == torch.bfloat16
    found = gradients(y, *of)
    assert [grad.dtype for grad in found] == [torch.float32] * 4
    for mine, theirs, true in zip(found, gradients(plain, *of), exact, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (mine - true).abs().max() <= (theirs - true).abs().max() + ulp


def test_nothing_is_kept_but_what_the_layer_would_keep_itself() -> None:
    scale, layer, x = made(bias=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda kept: kept):
        scale(layer, x)
    assert set(kept) == {value.data_ptr() for value in (x, layer.weight, layer.bias, scale.gamma)}


def test_a_layer_that_multiplies_in_fp8_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, layer = LayerScale(16, 2.0), nn.Linear(16, 16)
    fp8.convert(layer)
    assert fp8.is_converted(layer)
    monkeypatch.setattr(layer, "forward", lambda x: x + 1)
    with torch.no_grad():
        scale.gamma.fill_(2.0)
    torch.testing.assert_close(scale(layer, torch.ones(3, 16)), torch.full((3, 16), 4.0))
