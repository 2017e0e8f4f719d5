"""The vision transformer of DINOv3 (arXiv 2508.10104, section 3.2), under the names of the released weights.

Nothing here draws a random number or asks whether it is training: masks, drop-path indices and RoPE draws come in as
tensors (`model.networks.perturb`), so a recomputed or replayed forward sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import Backbone
from model.networks.blocks import Attention, Block, Kept, Mlp, SwiGlu
from model.networks.init import STD, Normal, Rule
from model.networks.perturb import Perturbation
from model.networks.rope import RopeEmbedding, Rotation


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
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Tokens are [CLS, registers, patches]. `forward` takes several groups of crops and runs them packed."""

    def __init__(self, settings: Backbone) -> None:
        super().__init__()
        dim = settings.dim
        self.settings = settings
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, settings.registers, dim)) if settings.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(settings.channels, dim, settings.patch_size)
        self.rope_embed = RopeEmbedding(dim // settings.heads, settings.rope_base)
        self.blocks = nn.ModuleList(_block(settings) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(dim, eps=settings.norm_eps)
        self.local_cls_norm = nn.LayerNorm(dim, eps=settings.norm_eps) if settings.untie_local_cls_norm else None

    def initial(self) -> dict[str, Rule]:
        return {"cls_token": Normal(STD), "storage_tokens": Normal(STD), "mask_token": 0.0}

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.settings.registers

    def forward(self, views: Sequence[View]) -> list[Features]:
        """The features of each group of crops, in order. Raises ValueError for sizes that do not fit the patches."""
        xs, rotations = self._embed(views)
        for depth, block in enumerate(self.blocks):
            xs = block(xs, rotations, _kept(views, depth))
        return [self._finish(x, view.local) for x, view in zip(xs, views, strict=True)]

    def features(self, images: Tensor) -> Features:
        """Of whole images [n, channels, height, width], nothing hidden or perturbed."""
        return self([View(images)])[0]  # type: ignore[no-any-return]

    def cls_attention(self, images: Tensor) -> Tensor:
        """How the CLS token of the last block attends to the patches: fp32 [n, heads, rows, columns].

        A head's entries sum to one minus what it gives to CLS and registers.
        """
        xs, rotations = self._embed([View(images)])
        for block in self.blocks[:-1]:
            xs = block(xs, rotations, [None])
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weights = last.attn.weights(last.norm1(xs[0]), rotations[0], query=0)[:, :, self.prefix :]
        return weights.reshape(*weights.shape[:2], *self._grid(images))

    def _embed(self, views: Sequence[View]) -> tuple[list[Tensor], list[Rotation]]:
        rotations = []
        for view in views:
            draws = None if view.perturbation is None else view.perturbation.rope
            rotations.append(self.rope_embed(*self._grid(view.images), self.prefix, draws))
        return [self._tokens(view) for view in views], rotations

    def _tokens(self, view: View) -> Tensor:
        patches = self.patch_embed(view.images)
        if view.masks is not None:
            patches = torch.where(view.masks[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = [self.cls_token] if self.storage_tokens is None else [self.cls_token, self.storage_tokens]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        size = self.settings.patch_size
        height, width = images.shape[-2:]
        if height % size or width % size:
            raise ValueError(f"an image of {height} x {width} pixels is not whole patches of {size} x {size}")
        return height // size, width // size

    def _finish(self, x: Tensor, local: bool) -> Features:
        prefix_norm = self.local_cls_norm if local and self.local_cls_norm is not None else self.norm
        prefix = prefix_norm(x[:, : self.prefix])
        return Features(prefix[:, 0], prefix[:, 1:], self.norm(x[:, self.prefix :]))


def _kept(views: Sequence[View], depth: int) -> list[Kept | None]:
    return [None if view.perturbation is None else view.perturbation.kept(depth) for view in views]


def _block(settings: Backbone) -> Block:
    dim = settings.dim
    mlp = (
        SwiGlu(dim, settings.ffn_ratio, settings.ffn_align)
        if settings.ffn == "swiglu"
        else Mlp(dim, settings.ffn_ratio)
    )
    attn = Attention(dim, settings.heads, qkv_bias=settings.qkv_bias, mask_k_bias=settings.mask_k_bias)
    return Block(dim, attn, mlp, layer_scale=settings.layer_scale, eps=settings.norm_eps)
