"""Transformer blocks over several groups of sequences at once.

Global and local crops differ in length. All their tokens are packed into one matrix [tokens, dim], which the residual
stream stays from the first block to the last; only attention looks at each group apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.accounting import swiglu_width
from model.networks.again import again
from model.networks.attention import Group, attend, split_heads
from model.networks.init import Rule
from model.networks.layer_scale import LayerScale
from model.networks.rope import Rotation


@dataclass(frozen=True)
class Kept:
    """Batch-subset drop path of one block for one group of sequences: only these go through the residual branches."""

    attention: Tensor  # int64 [kept]: indices of sequences, each at most once
    ffn: Tensor  # int64 [kept]
    scale: float  # sequences / kept: keeps the expectation of the residual


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor, scale: LayerScale | None = None) -> Tensor:
        return again(F.gelu, [self.fc1(x)], _last(self.fc2, scale))


class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x) (arXiv 2002.05202), two thirds as wide as the MLP it stands for, rounded up to `align`."""

    def __init__(self, dim: int, ratio: float, align: int) -> None:
        super().__init__()
        hidden = swiglu_width(dim, ratio, align)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: LayerScale | None = None) -> Tensor:
        return again(_gated, [self.w1(x), self.w2(x)], _last(self.w3, scale))


class FusedSwiGlu(nn.Module):
    """The same with w1 and w2 in one matrix, as DINOv2 has it."""

    def __init__(self, dim: int, ratio: float, align: int) -> None:
        super().__init__()
        hidden = swiglu_width(dim, ratio, align)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: LayerScale | None = None) -> Tensor:
        return again(_gated, self.w12(x).chunk(2, dim=-1), _last(self.w3, scale))


def _last(layer: nn.Linear, scale: LayerScale | None) -> Callable[[Tensor], Tensor]:
    """A branch's last layer, with the branch's factor if it has one."""
    return layer if scale is None else partial(scale, layer)


def _gated(gate: Tensor, value: Tensor) -> Tensor:
    return again(F.silu, [gate], lambda opened: opened * value)


class KeyMaskedLinear(nn.Linear):
    """Queries, keys and values, the keys without their bias: softmax does not see it, and in bf16 it only grows."""

    bias_mask: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)
        self.register_buffer("bias_mask", torch.empty(3 * dim))

    def initial(self) -> dict[str, Rule]:
        return {"bias_mask": torch.tensor([1.0, 0.0, 1.0], device="cpu").repeat_interleave(self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, *, qkv_bias: bool, mask_k_bias: bool, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = KeyMaskedLinear(dim) if qkv_bias and mask_k_bias else nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: Sequence[Group], scale: LayerScale | None = None) -> Tensor:
        """Of the packed tokens [tokens, dim] of these groups."""
        return attend(self.qkv(x), groups, self.heads, _last(self.proj, scale), causal=self.causal)

    def weights(self, x: Tensor, rotation: Rotation | None, query: int) -> Tensor:
        """What the token at `query` attends to: [sequences, heads, tokens] of x [sequences, tokens, dim], fp32. For
        pictures."""
        q, k, _ = split_heads(self.qkv(x), rotation, self.heads)
        scores = q[:, :, query, None].float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1)[:, :, 0]


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, dim: int, attn: Attention, mlp: nn.Module, *, layer_scale: float | None, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, groups: Sequence[Group], kept: Sequence[Kept | None]) -> Tensor:
        """x: the packed tokens [tokens, dim] of these groups; kept: one a group, None for all of its sequences."""
        x = _residual(x, groups, [None if k is None else (k.attention, k.scale) for k in kept], self._attend)
        return _residual(x, groups, [None if k is None else (k.ffn, k.scale) for k in kept], self._feed)

    def _attend(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        return again(self.norm1, [x], lambda y: self.attn(y, groups, self.ls1))

    def _feed(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        return again(self.norm2, [x], lambda y: self.mlp(y, self.ls2))


def _residual(
    x: Tensor,
    groups: Sequence[Group],
    kept: Sequence[tuple[Tensor, float] | None],
    branch: Callable[[Tensor, Sequence[Group]], Tensor],
) -> Tensor:
    """x plus the branch of it; or of the sequences of each group that are `kept`, scaled."""
    if all(keep is None for keep in kept):
        return x + branch(x, groups)
    rows, scales, chosen, start = [], [], [], 0
    for group, keep in zip(groups, kept, strict=True):
        index, scale = (torch.arange(group.sequences, device=x.device), 1.0) if keep is None else keep
        tokens = start + index[:, None] * group.tokens + torch.arange(group.tokens, device=x.device)
        rows.append(tokens.flatten())
        scales.append(x.new_full((tokens.numel(), 1), scale))
        chosen.append(group.select(index))
        start += group.rows
    row = torch.cat(rows)
    return x.index_add(0, row, (branch(x.index_select(0, row), chosen) * torch.cat(scales)).to(x.dtype))
