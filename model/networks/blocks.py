"""Transformer blocks over several groups of sequences at once.

Global and local crops differ in length, so they come as a list of [crops, tokens, dim]. Whatever works token by token
(norms, linear layers) runs on all of them packed into one matrix; only attention looks at each group apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.accounting import swiglu_width
from model.networks.init import Rule
from model.networks.rope import Rotation


@dataclass(frozen=True)
class Kept:
    """Batch-subset drop path of one block for one group of sequences: only these go through the residual branches."""

    attention: Tensor  # int64 [kept]: indices of sequences, each at most once
    ffn: Tensor  # int64 [kept]
    scale: float  # sequences / kept: keeps the expectation of the residual


class LayerScale(nn.Module):
    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))

    def initial(self) -> dict[str, Rule]:
        return {"gamma": self.value}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    """w3(silu(w1 x) * w2 x) (arXiv 2002.05202), two thirds as wide as the MLP it stands for, rounded up to `align`."""

    def __init__(self, dim: int, ratio: float, align: int) -> None:
        super().__init__()
        hidden = swiglu_width(dim, ratio, align)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))  # type: ignore[no-any-return]


class FusedSwiGlu(nn.Module):
    """The same with w1 and w2 in one matrix, as DINOv2 has it."""

    def __init__(self, dim: int, ratio: float, align: int) -> None:
        super().__init__()
        hidden = swiglu_width(dim, ratio, align)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)  # type: ignore[no-any-return]


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

    def forward(self, x: Tensor, shapes: Sequence[torch.Size], rotations: Sequence[Rotation | None]) -> Tensor:
        """x: [tokens of all groups, dim], packed; shapes: of each group, [sequences, tokens, dim]."""
        groups = zip(unpack(self.qkv(x), shapes), rotations, strict=True)
        return self.proj(pack([self._attend(qkv, rotation) for qkv, rotation in groups]))  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor, rotation: Rotation | None) -> Tensor:
        if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
            qkv = qkv.float()  # on a CPU, torch's attention takes five times as long backward in bf16 as in fp32
        q, k, v = self._split(qkv, rotation)
        with torch.autocast(qkv.device.type, enabled=False):  # which would take it back to bf16
            attended: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)

    def _split(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """[sequences, tokens, 3 dim] as three [sequences, heads, tokens, head dim], queries and keys rotated."""
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return (q, k, v) if rotation is None else (rotation.turn(q), rotation.turn(k), v)

    def weights(self, x: Tensor, rotation: Rotation | None, query: int) -> Tensor:
        """What the token at `query` attends to: [sequences, heads, tokens], fp32. For pictures."""
        q, k, _ = self._split(self.qkv(x), rotation)
        scores = q[:, :, query, None].float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1)[:, :, 0]


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, dim: int, attn: Attention, mlp: nn.Module, *, layer_scale: float | None, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self, xs: Sequence[Tensor], rotations: Sequence[Rotation | None], kept: Sequence[Kept | None]
    ) -> list[Tensor]:
        """xs, rotations and kept: one a group of sequences; None: no rotation, every sequence kept."""
        indices = [None if k is None else k.attention for k in kept]
        chosen = _choose(xs, indices)
        turns = [None if r is None else r.select(i) for r, i in zip(rotations, indices, strict=True)]
        shapes = [x.shape for x in chosen]
        xs = _add(xs, self.ls1(self.attn(self.norm1(pack(chosen)), shapes, turns)), shapes, indices, kept)

        indices = [None if k is None else k.ffn for k in kept]
        chosen = _choose(xs, indices)
        shapes = [x.shape for x in chosen]
        return _add(xs, self.ls2(self.mlp(self.norm2(pack(chosen)))), shapes, indices, kept)


def _choose(xs: Sequence[Tensor], indices: Sequence[Tensor | None]) -> list[Tensor]:
    return [x if index is None else x[index] for x, index in zip(xs, indices, strict=True)]


def _add(
    xs: Sequence[Tensor],
    residual: Tensor,
    shapes: Sequence[torch.Size],
    indices: Sequence[Tensor | None],
    kept: Sequence[Kept | None],
) -> list[Tensor]:
    """Each group plus its rows of the packed residual, scaled where only some of its sequences have one."""
    sums = []
    for x, y, index, keep in zip(xs, unpack(residual, shapes), indices, kept, strict=True):
        if index is None or keep is None:
            sums.append(x + y)
        else:
            sums.append(x.index_add(0, index, y.to(x.dtype), alpha=keep.scale))
    return sums


def pack(xs: Sequence[Tensor]) -> Tensor:
    """[sequences, tokens, width] of several groups as one [all tokens, width]."""
    flat = [x.flatten(0, 1) for x in xs]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The inverse of `pack`, whatever the width has become."""
    parts = torch.split(flat, [shape[0] * shape[1] for shape in shapes])
    return [part.reshape(*shape[:2], -1) for part, shape in zip(parts, shapes, strict=True)]
