"""Attention of packed groups of sequences: torch's fused one, and on a CPU another for short sequences.

For 14 to 50 tokens, as small crops have, plain products are faster than torch's kernel (tests/benchmarks/losses.py);
its advantage begins at some two hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses.precision import promote
from model.networks.again import again
from model.networks.rope import Rotation

SHORT = 128
"""Tokens up to which plain products are faster on a CPU."""

LANES = 16
"""Numbers that torch's softmax takes at once, where a row has as many; shorter rows it takes one by one."""


@dataclass(frozen=True)
class Group:
    """Sequences of one length, one after the other in a packed matrix of tokens."""

    sequences: int
    tokens: int  # of each
    rotation: Rotation | None = None

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    def select(self, index: Tensor) -> Group:
        """These sequences only."""
        return Group(len(index), self.tokens, None if self.rotation is None else self.rotation.select(index))


def pack(xs: Sequence[Tensor]) -> Tensor:
    """[sequences, tokens, width] of several groups as one [all tokens, width]."""
    flat = [x.flatten(0, 1) for x in xs]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(flat: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """The inverse of `pack`, whatever the width has become."""
    parts = torch.split(flat, [group.rows for group in groups])
    return [part.view(group.sequences, group.tokens, -1) for part, group in zip(parts, groups, strict=True)]


def attend(
    qkv: Tensor, groups: Sequence[Group], heads: int, then: Callable[[Tensor], Tensor], *, causal: bool = False
) -> Tensor:
    """`then` of what each token gathers from its sequence, [tokens, dim]; qkv: packed queries, keys and values
    [tokens, 3 dim]."""
    longest = max(group.tokens for group in groups)
    if qkv.device.type == "cpu" and longest <= SHORT and not causal and not torch.compiler.is_compiling():
        dtype = qkv.dtype
        return again(lambda *parts: _gather(parts, groups, dtype), _Split.apply(qkv, groups, heads), then)
    parts = zip(unpack(qkv, groups), groups, strict=True)
    return then(pack([_fused(part, group.rotation, heads, causal) for part, group in parts]))


def split_heads(qkv: Tensor, rotation: Rotation | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[sequences, tokens, 3 dim] as three [sequences, heads, tokens, head dim], queries and keys rotated."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return (q, k, v) if rotation is None else (rotation.turn(q), rotation.turn(k), v)


def _fused(qkv: Tensor, rotation: Rotation | None, heads: int, causal: bool) -> Tensor:
    if qkv.device.type == "cpu":
        qkv = promote(qkv)  # torch's CPU kernel takes five times as long backward in bf16 as in fp32
    q, k, v = split_heads(qkv, rotation, heads)
    with torch.autocast(qkv.device.type, enabled=False):  # which would take it back to bf16
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return attended.transpose(1, 2).flatten(2)


def _gather(parts: Sequence[Tensor], groups: Sequence[Group], dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _Gathered.apply(groups, dtype, *parts)  # type: ignore[no-any-return]


class _Split(torch.autograd.Function):
    """Packed [tokens, 3 dim] to rotated queries, rotated keys and values, [3, sequences, heads, tokens, head dim] of
    each group, fp32 at least. All that backward needs of attention is these."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Sequence[Group], heads: int) -> tuple[Tensor, ...]:
        ctx.groups, ctx.heads, ctx.dtype = groups, heads, qkv.dtype
        parts = []
        for rows, group in _ranges(groups):
            given = promote(_by_head(qkv[rows], group, heads, 3))
            parts.append(given.new_empty(given.shape))
            _copy_turned(given, parts[-1], group.rotation)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        tokens, width = sum(group.rows for group in ctx.groups), 3 * ctx.heads * gradients[0].shape[-1]
        dqkv = gradients[0].new_empty(tokens, width, dtype=ctx.dtype)
        for (rows, group), g in zip(_ranges(ctx.groups), gradients, strict=True):
            back = None if group.rotation is None else group.rotation.inverse()
            _copy_turned(g, _by_head(dqkv[rows], group, ctx.heads, 3), back)
        return dqkv, None, None


class _Gathered(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by plain products, of the parts of `_Split`: [tokens, dim]."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[Group], dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.groups = groups
        _, _, heads, _, width = parts[0].shape
        out = parts[0].new_empty(sum(group.rows for group in groups), heads * width, dtype=dtype)
        for (rows, group), (q, k, v) in zip(_ranges(groups), parts, strict=True):
            gathered = torch.bmm(_weights(_flat(q), _flat(k)), _flat(v))
            _by_head(out[rows], group, heads, 1)[0].copy_(gathered.view_as(v))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), parts = gradients, ctx.saved_tensors
        found = [torch.empty_like(part) for part in parts]
        for (rows, group), part, d in zip(_ranges(ctx.groups), parts, found, strict=True):
            q, k, v = (_flat(x) for x in part)
            dq, dk, dv = (_flat(x) for x in d)
            dout = _flat(promote(_by_head(g[rows], group, part.shape[2], 1)[0]).contiguous())
            p = _weights(q, k)
            ds = _softmax_backward(torch.bmm(dout, v.mT), p).mul_(q.shape[-1] ** -0.5)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.mT, q, out=dk)
            torch.bmm(p.mT, dout, out=dv)
        return (None, None, *found)


def _ranges(groups: Sequence[Group]) -> Iterator[tuple[slice, Group]]:
    start = 0
    for group in groups:
        yield slice(start, start + group.rows), group
        start += group.rows


def _by_head(x: Tensor, group: Group, heads: int, parts: int) -> Tensor:
    """[rows, parts * dim] seen as [parts, sequences, heads, tokens, head dim]."""
    return x.view(group.sequences, group.tokens, parts, heads, -1).permute(2, 0, 3, 1, 4)


def _copy_turned(x: Tensor, into: Tensor, rotation: Rotation | None) -> None:
    """Queries, keys and values [3, sequences, heads, tokens, head dim], the former two rotated."""
    if rotation is None:
        into.copy_(x)
    else:
        rotation.copy_turned(x[:2], into[:2])
        into[2].copy_(x[2])


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of [batch, tokens, d]."""
    return _softmax(torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5))


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= LANES:
        return scores.softmax(dim=-1)
    e = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    return e.div_(e.sum(dim=-1, keepdim=True))


def _softmax_backward(g: Tensor, p: Tensor) -> Tensor:
    if p.shape[-1] >= LANES:
        return torch._softmax_backward_data(g, p, -1, p.dtype)
    g.mul_(p)
    return g.sub_(p * g.sum(dim=-1, keepdim=True))
