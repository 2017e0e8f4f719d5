"""Axial rotary position embedding (RoFormer, arXiv 2104.09864, on the two axes of an image; DINOv3 section 3.2).

Everything here is fp32 by default: in bf16, which DINOv3 was trained with (`rope_dtype`), sines are off by up to 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.networks.init import Rule


@dataclass(frozen=True)
class RopeDraws:
    """How the coordinates of each crop are bent in training (DINOv3 section 3.2: box jittering).

    Both may have a first dimension of blocks, where each block has draws of its own (`rope_per_block`).
    """

    shift: Tensor  # fp32 [crops, 2]: added to (y, x), which lie in [-1, 1]
    scale: Tensor  # fp32 [crops, 2]: then they are multiplied by this (jitter per axis times rescale)

    def at(self, block: int) -> RopeDraws:
        """Those of one block."""
        return self if self.shift.ndim == 2 else RopeDraws(self.shift[block], self.scale[block])

    def to(self, device: torch.device) -> RopeDraws:
        return RopeDraws(self.shift.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine for every token and channel of a head; the first dimension is crops, or 1 if all are alike."""

    cos: Tensor  # fp32, or bf16 or float64 [crops or 1, 1, tokens, head dim]
    sin: Tensor

    def select(self, crops: Tensor | None) -> Rotation:
        """Of these crops only; of all for None."""
        if crops is None or len(self.cos) == 1:
            return self
        return Rotation(self.cos[crops], self.sin[crops])

    def inverse(self) -> Rotation:
        return Rotation(self.cos, -self.sin)

    def turn(self, x: Tensor) -> Tensor:
        """Rotate [crops, heads, tokens, head dim] in `cos`'s dtype; the result has x's. Channels (i, i + half) pair
        up."""
        wide, half = x.to(self.cos.dtype), x.shape[-1] // 2
        first, second = self.sin.chunk(2, dim=-1)
        return (wide * self.cos + wide.roll(half, dims=-1) * torch.cat((-first, second), dim=-1)).to(x.dtype)

    def copy_turned(self, x: Tensor, into: Tensor) -> None:
        """`turn` into another tensor, where no gradient is asked for; either may lie in memory in any order. Rounds to
        the other's dtype once, at the end."""
        if x.dtype != self.cos.dtype:
            into.copy_(self.turn(x))
            return
        out = into if into.dtype == x.dtype else torch.empty_like(x)
        torch.mul(x, self.cos, out=out)
        (x1, x2), (out1, out2), (sin1, sin2) = (t.chunk(2, dim=-1) for t in (x, out, self.sin))
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        if out is not into:
            into.copy_(out)


def periods(head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Wavelengths [head_dim / 4], from 1 up: base ** (2 i / (head_dim / 2))."""
    exponents = 2 * torch.arange(head_dim // 4, dtype=dtype, device="cpu") / (head_dim // 2)
    return torch.pow(torch.tensor(base, dtype=dtype, device="cpu"), exponents)


def coordinates(height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres (y, x) of the patches of a grid, row by row, each axis scaled to [-1, 1]: [height * width, 2]."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2) * 2 - 1


class RopeEmbedding(nn.Module):
    """Holds the wavelengths, as a buffer that is saved; it has nothing to learn."""

    periods: Tensor

    def __init__(self, head_dim: int, base: float, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.register_buffer("periods", torch.empty(head_dim // 4))

    def initial(self) -> dict[str, Rule]:
        return {"periods": periods(self.head_dim, self.base, self.dtype)}

    def forward(self, height: int, width: int, prefix: int, draws: RopeDraws | None = None) -> Rotation:
        """The rotation of a height x width grid of patches after `prefix` tokens, which have no place and stay."""
        dtype = torch.float64 if self.periods.dtype == torch.float64 else self.dtype
        at = coordinates(height, width, self.periods.device, dtype)[None]
        if draws is not None:
            at = (at + draws.shift[:, None].to(dtype)) * draws.scale[:, None].to(dtype)
        angles = 2 * torch.pi * at[..., None] / self.periods.to(dtype)  # [crops or 1, patches, 2, head dim / 4]
        angles = angles.flatten(2).tile(2)
        still = angles.new_zeros(len(angles), prefix, self.head_dim)  # cos 1, sin 0
        angles = torch.cat((still, angles), dim=1)[:, None]
        return Rotation(angles.cos(), angles.sin())
