"""Attention of packed groups of sequences: torch's fused one, and on a CPU another for short sequences.

For 14 to 50 tokens, as small crops have, torch's CPU kernel takes twice as long as plain products do, and backward in
bf16 six times (tests/benchmarks/attention.py). Its advantage, that it keeps no scores, begins at a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses.precision import promote
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


def attend(qkv: Tensor, groups: Sequence[Group], heads: int, *, causal: bool = False) -> Tensor:
    """What each token gathers from its sequence: packed queries, keys and values [tokens, 3 dim] -> [tokens, dim]."""
    longest = max(group.tokens for group in groups)
    if qkv.device.type == "cpu" and longest <= SHORT and not causal and not torch.compiler.is_compiling():
        with torch.autocast("cpu", enabled=False):
            return _Short.apply(qkv, groups, heads)  # type: ignore[no-any-return]
    parts = zip(unpack(qkv, groups), groups, strict=True)
    return pack([_fused(part, group.rotation, heads, causal) for part, group in parts])


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


class _Short(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by plain products, fp32 at least: each pass over the tokens writes into its place."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Sequence[Group], heads: int) -> Tensor:
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        kept = []
        for rows, group in _ranges(groups):
            q, k, v = three = _to_heads(qkv[rows], group, heads, 3)
            if group.rotation is not None:
                group.rotation.turn_(three[:2])
            p = _softmax(torch.baddbmm(q.new_empty(()), _flat(q), _flat(k).mT, beta=0, alpha=q.shape[-1] ** -0.5))
            _from_heads(torch.bmm(p, _flat(v)).view_as(v)[None], out[rows], group)
            kept += [three, p]
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.heads, ctx.dtype = groups, heads, qkv.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        kept, dqkv = ctx.saved_tensors, g.new_empty(len(g), 3 * g.shape[1])
        for (rows, group), three, p in zip(_ranges(ctx.groups), kept[::2], kept[1::2], strict=True):
            q, k, v = (_flat(x) for x in three)
            (out,) = _to_heads(g[rows], group, ctx.heads, 1)
            d = torch.empty_like(three)
            dq, dk, dv = (_flat(x) for x in d)
            ds = _softmax_backward(torch.bmm(_flat(out), v.mT), p).mul_(q.shape[-1] ** -0.5)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.mT, q, out=dk)
            torch.bmm(p.mT, _flat(out), out=dv)
            if group.rotation is not None:
                group.rotation.inverse().turn_(d[:2])
            _from_heads(d, dqkv[rows], group)
        return dqkv, None, None


def _ranges(groups: Sequence[Group]) -> Iterator[tuple[slice, Group]]:
    start = 0
    for group in groups:
        yield slice(start, start + group.rows), group
        start += group.rows


def _to_heads(x: Tensor, group: Group, heads: int, parts: int) -> Tensor:
    """[rows, parts * dim] copied to [parts, sequences, heads, tokens, head dim], fp32 at least."""
    split = x.view(group.sequences, group.tokens, parts, heads, -1).permute(2, 0, 3, 1, 4)
    return promote(split).contiguous()


def _from_heads(x: Tensor, into: Tensor, group: Group) -> None:
    """The inverse of `_to_heads`."""
    parts, _, heads, _, _ = x.shape
    into.view(group.sequences, group.tokens, parts, heads, -1).copy_(x.permute(1, 3, 0, 2, 4))


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


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
