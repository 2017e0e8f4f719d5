"""Short sequences on a CPU against torch's own attention; what is computed again against what is kept."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.networks import attention
from model.networks.again import again
from model.networks.attention import Group, attend, pack, split_heads, unpack
from model.networks.init import create
from model.networks.rope import RopeDraws, RopeEmbedding

HEADS, WIDTH = 2, 8


def groups():
    """Rows longer and shorter than the softmax's lanes; turned crop by crop, all alike, and not at all."""
    rope = create(lambda: RopeEmbedding(WIDTH, 100.0), 0, "rope").double()
    draws = RopeDraws(
        torch.tensor([[0.1, -0.2], [0.0, 0.3], [0.2, 0.2]]), torch.tensor([[2.0, 0.5], [1.5, 1.0], [0.7, 1.2]])
    )
    return [Group(3, 18, rope(4, 4, 2, draws)), Group(4, 6, rope(2, 2, 2)), Group(2, 5)]


def packed(dtype=torch.float64):
    rows = sum(group.rows for group in groups())
    return torch.randn(rows, 3 * HEADS * WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(0))


def by_torch(qkv):
    out = []
    for part, group in zip(unpack(qkv, groups()), groups(), strict=True):
        attended = F.scaled_dot_product_attention(*split_heads(part, group.rotation, HEADS))
        out.append(attended.transpose(1, 2).flatten(2))
    return pack(out)


def result_and_gradient(function):
    qkv = packed().requires_grad_()
    out = function(qkv)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()).sum().backward()
    return out.detach(), qkv.grad


def same(attended):
    return attended


def test_short_sequences_are_what_torch_computes(monkeypatch):
    expected = result_and_gradient(by_torch)
    found = result_and_gradient(lambda qkv: attend(qkv, groups(), HEADS, same))
    monkeypatch.setattr(attention, "SHORT", 17)
    fused = result_and_gradient(lambda qkv: attend(qkv, groups(), HEADS, same))
    for values in (found, fused):
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_bf16_is_rounded_once_at_the_end():
    qkv = packed(torch.bfloat16).requires_grad_()
    plain = [Group(group.sequences, group.tokens) for group in groups()]
    out = attend(qkv, plain, HEADS, same)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(qkv.float(), plain, HEADS, same).bfloat16())
    out.sum().backward()
    assert qkv.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_computed_again_gives_the_same_gradients(autocast):
    layer, h = torch.nn.Linear(32, 16), torch.randn(64, 32)

    def gradients(run):
        layer.zero_grad()
        x = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        out.square().sum().backward()
        return out.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()

    plain = gradients(lambda x: layer(F.gelu(x)))
    for values in (
        gradients(lambda x: again(F.gelu, [x], layer)),
        gradients(lambda x: checkpoint(again, F.gelu, [x], layer, use_reentrant=False)),
    ):
        for one, other in zip(values, plain, strict=True):
            assert torch.equal(one, other)


def test_the_result_is_not_kept():
    layer, freed = torch.nn.Linear(32, 16), []

    def function(x):
        y = F.gelu(x)
        freed.append(y.untyped_storage()._weak_ref())
        return y

    x = torch.randn(64, 32).requires_grad_()
    out = again(function, [x], layer)
    assert torch.UntypedStorage._expired(freed[0])
    out.sum().backward()
    assert x.grad is not None
