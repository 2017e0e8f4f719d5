"""Axial rotary position embedding (RoFormer, arXiv 2104.09864, on the two axes of an image; DINOv3 section 3.2).

Everything here is fp32: in bf16 the angles of a 14 x 14 grid are off by up to 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.networks.init import Rule


@dataclass(frozen=True)
class RopeDraws:
    """How the coordinates of each crop are bent in training (DINOv3 section 3.2: box jittering)."""

    shift: Tensor  # fp32 [crops, 2]: added to (y, x), which lie in [-1, 1]
    scale: Tensor  # fp32 [crops, 2]: then they are multiplied by this (jitter per axis times rescale)

    def to(self, device: torch.device) -> RopeDraws:
        return RopeDraws(self.shift.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine for every token and channel of a head; the first dimension is crops, or 1 if all are alike."""

    cos: Tensor  # fp32 [crops or 1, 1, tokens, head dim]
    sin: Tensor

    def select(self, crops: Tensor | None) -> Rotation:
        """Of these crops only; of all for None."""
        if crops is None or len(self.cos) == 1:
            return self
        return Rotation(self.cos[crops], self.sin[crops])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate [crops, heads, tokens, head dim] in fp32; the result has x's dtype. Channels (i, i + half) pair up."""
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(x.dtype)


def periods(head_dim: int, base: float) -> Tensor:
    """Wavelengths fp32 [head_dim / 4], from 1 up: base ** (2 i / (head_dim / 2))."""
    exponents = 2 * torch.arange(head_dim // 4, dtype=torch.float32, device="cpu") / (head_dim // 2)
    return torch.pow(torch.tensor(base, dtype=torch.float32, device="cpu"), exponents)


def coordinates(height: int, width: int, device: torch.device) -> Tensor:
    """Centres (y, x) of the patches of a grid, row by row, each axis scaled to [-1, 1]: fp32 [height * width, 2]."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2) * 2 - 1


class RopeEmbedding(nn.Module):
    """Holds the wavelengths, as a buffer that is saved; it has nothing to learn."""

    periods: Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.register_buffer("periods", torch.empty(head_dim // 4))

    def initial(self) -> dict[str, Rule]:
        return {"periods": periods(self.head_dim, self.base)}

    def forward(self, height: int, width: int, prefix: int, draws: RopeDraws | None = None) -> Rotation:
        """The rotation of a height x width grid of patches after `prefix` tokens, which have no place and stay."""
        at = coordinates(height, width, self.periods.device)[None]
        if draws is not None:
            at = (at + draws.shift[:, None]) * draws.scale[:, None]
        angles = 2 * torch.pi * at[..., None] / self.periods.float()  # [crops or 1, patches, 2, head dim / 4]
        angles = angles.flatten(2).tile(2)
        still = angles.new_zeros(len(angles), prefix, self.head_dim)  # cos 1, sin 0
        angles = torch.cat((still, angles), dim=1)[:, None]
        return Rotation(angles.cos(), angles.sin())
