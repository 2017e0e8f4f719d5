"""The vision transformer of DINO, v2 and v3 (arXiv 2104.14294, 2304.07193, 2508.10104), under the released names.

Versions 1 and 2 learn a table of positions, version 3 turns queries and keys by their place (RoPE).

Nothing here draws a random number or asks whether it is training: masks, drop-path indices and RoPE draws come in as
tensors (`model.networks.perturb`), so a recomputed or replayed forward sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import Backbone
from model.networks.attention import Group, pack, unpack
from model.networks.blocks import Attention, Block, FusedSwiGlu, Kept, Mlp, SwiGlu
from model.networks.init import STD, Normal, Rule
from model.networks.perturb import Perturbation
from model.networks.rope import RopeEmbedding


@dataclass(frozen=True)
class View:
    """A group of crops of one size."""

    images: Tensor  # [crops, channels, height, width], both sides multiples of the patch size
    masks: Tensor | None = None  # bool [crops, patches]: these patches are hidden behind the mask token
    perturbation: Perturbation | None = None  # drop path and RoPE draws; None for a plain forward
    local: bool = False  # local crops: their CLS and registers pass a norm of their own, where the network has one


@dataclass(frozen=True)
class Features:
    """What the network says of a group of crops, after the final norm."""

    cls: Tensor  # [crops, dim]
    registers: Tensor  # [crops, registers, dim]
    patches: Tensor  # [crops, patches, dim], row by row


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        """[n, channels, height, width] -> [n, patches, dim], as one product: a convolution is slower on a CPU."""
        weight = self.proj.weight
        n, channels, height, width = images.shape
        size = weight.shape[-1]
        patches = images.view(n, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, -1, channels * size * size), weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Tokens are [CLS, registers, patches]. `forward` takes several groups of crops and runs them packed."""

    def __init__(self, settings: Backbone) -> None:
        super().__init__()
        dim = settings.dim
        self.settings = settings
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, settings.registers, dim)) if settings.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim)) if settings.mask_token else None
        self.patch_embed = PatchEmbed(settings.channels, dim, settings.patch_size)
        side = settings.position_grid
        self.pos_embed = None if side is None else nn.Parameter(torch.empty(1, 1 + side * side, dim))
        rope = RopeEmbedding(dim // settings.heads, settings.rope_base, settings.rope_dtype)
        self.rope_embed = rope if settings.positions == "rope" else None
        self.blocks = nn.ModuleList(_block(settings) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(dim, eps=settings.norm_eps)
        self.local_cls_norm = nn.LayerNorm(dim, eps=settings.norm_eps) if settings.untie_local_cls_norm else None

    def initial(self) -> dict[str, Rule]:
        tokens = Normal(self.settings.token_std)
        return {"cls_token": tokens, "storage_tokens": tokens, "mask_token": 0.0, "pos_embed": Normal(STD)}

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.settings.registers

    def forward(self, views: Sequence[View]) -> list[Features]:
        """The features of each group of crops, in order. Raises ValueError for sizes that do not fit the patches."""
        x, groups = self._embed(views)
        for depth, block in enumerate(self.blocks):
            if depth and self.settings.rope_per_block:
                groups = self._groups(views, depth)
            x = block(x, groups, _kept(views, depth))
        return self._finish(x, groups, views)

    def features(self, images: Tensor) -> Features:
        """Of whole images [n, channels, height, width], nothing hidden or perturbed."""
        return self([View(images)])[0]  # type: ignore[no-any-return]

    def cls_attention(self, images: Tensor) -> Tensor:
        """How the CLS token of the last block attends to the patches: fp32 [n, heads, rows, columns].

        A head's entries sum to one minus what it gives to CLS and registers.
        """
        x, groups = self._embed([View(images)])
        for block in self.blocks[:-1]:
            x = block(x, groups, [None])
        last = self.blocks[-1]
        assert isinstance(last, Block)
        (sequences,) = unpack(last.norm1(x), groups)
        weights = last.attn.weights(sequences, groups[0].rotation, query=0)[:, :, self.prefix :]
        return weights.reshape(*weights.shape[:2], *self._grid(images))

    def _embed(self, views: Sequence[View]) -> tuple[Tensor, list[Group]]:
        return pack([self._tokens(view) for view in views]), self._groups(views, 0)

    def _groups(self, views: Sequence[View], depth: int) -> list[Group]:
        """How the crops of each view lie among the packed tokens, with their rotation in that block."""
        groups = []
        for view in views:
            height, width = self._grid(view.images)
            rotation = None
            if self.rope_embed is not None:
                draws = None if view.perturbation is None else view.perturbation.rope
                rotation = self.rope_embed(height, width, self.prefix, None if draws is None else draws.at(depth))
            groups.append(Group(len(view.images), self.prefix + height * width, rotation))
        return groups

    def _tokens(self, view: View) -> Tensor:
        grid = self._grid(view.images)
        patches = self.patch_embed(view.images)
        if view.masks is not None:
            if self.mask_token is None:
                raise ValueError(
                    "this backbone has no mask token (model.backbone.mask_token), so nothing can be masked"
                )
            patches = torch.where(view.masks[..., None], self.mask_token.to(patches.dtype), patches)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :1]
            patches = patches + resize_positions(self.pos_embed[:, 1:], grid, self.settings.position_offset)
        prefix = [cls] if self.storage_tokens is None else [cls, self.storage_tokens]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        size = self.settings.patch_size
        height, width = images.shape[-2:]
        if height % size or width % size:
            raise ValueError(f"an image of {height} x {width} pixels is not whole patches of {size} x {size}")
        return height // size, width // size

    def _finish(self, x: Tensor, groups: Sequence[Group], views: Sequence[View]) -> list[Features]:
        features = []
        for tokens, normed, view in zip(unpack(x, groups), unpack(self.norm(x), groups), views, strict=True):
            prefix, patches = torch.split(normed, [self.prefix, normed.shape[1] - self.prefix], dim=1)
            if view.local and self.local_cls_norm is not None:
                prefix = self.local_cls_norm(tokens[:, : self.prefix])
            features.append(Features(prefix[:, 0], prefix[:, 1:], patches))
        return features


def resize_positions(table: Tensor, grid: tuple[int, int], offset: float) -> Tensor:
    """Learnt positions [1, side * side, dim] for the patches of a grid (rows, columns): [1, rows * columns, dim].

    Bicubic, by the factor (rows + offset) / side, which is not quite rows / side: the released code adds 0.1 against
    rounding, and the kernel sees it. The table as it is where the grid is its own.
    """
    side = math.isqrt(table.shape[1])
    if grid == (side, side):
        return table
    maps = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    maps = maps if maps.dtype == torch.float64 else maps.float()
    factors = ((grid[0] + offset) / side, (grid[1] + offset) / side)
    with torch.autocast(table.device.type, enabled=False):
        resized = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
    if resized.shape[2:] != grid:
        raise ValueError(
            f"positions of a {side} x {side} grid do not fit {grid}: position_offset {offset} is too large"
        )
    return resized.flatten(2).transpose(1, 2)


def _kept(views: Sequence[View], depth: int) -> list[Kept | None]:
    return [None if view.perturbation is None else view.perturbation.kept(depth) for view in views]


def _block(settings: Backbone) -> Block:
    dim = settings.dim
    mlp: nn.Module
    if settings.ffn == "mlp":
        mlp = Mlp(dim, settings.ffn_ratio)
    else:
        swiglu = SwiGlu if settings.ffn == "swiglu" else FusedSwiGlu
        mlp = swiglu(dim, settings.ffn_ratio, settings.ffn_align)
    attn = Attention(dim, settings.heads, qkv_bias=settings.qkv_bias, mask_k_bias=settings.mask_k_bias)
    return Block(dim, attn, mlp, layer_scale=settings.layer_scale, eps=settings.norm_eps)
