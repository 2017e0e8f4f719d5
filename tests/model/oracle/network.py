"""The backbones and heads of DINO, v2 and v3 again, one crop at a time, from tensors by name: what is there of them
says which version it is. Imports nothing of model/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.model.oracle.formulas import bicubic

Weights = dict[str, Tensor]
Pair = tuple[float, float]

HEADS, PATCH, EPS, POSITION_OFFSET = 2, 4, 1e-5, 0.1


@dataclass(frozen=True)
class Disturbed:
    """What one crop suffers in training. Both lists have an entry a block."""

    bends: Sequence[tuple[Pair, Pair]] = ()  # RoPE's (y, x): what is added, then multiplied with; (): left alone
    residuals: Sequence[Pair] = ()  # what attention's and FFN's residual is multiplied by, 0: dropped; (): 1


def backbone(w: Weights, image: Tensor, mask: Tensor | None = None, how: Disturbed | None = None, *, local: bool = False
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised CLS [D] and patches [N, D] of an image [3, H, W]; mask: bool [N]."""
    prefix, patches = tokens(w, image, mask, how, local=local)
    return prefix[0], patches


def tokens(w: Weights, image: Tensor, mask: Tensor | None = None, how: Disturbed | None = None, *, local: bool = False
           ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the registers: [1 + registers, D] and [N, D]."""
    grid = image.shape[1] // PATCH, image.shape[2] // PATCH
    x = _embed(w, image, grid, mask)
    prefix = len(x) - grid[0] * grid[1]
    x = blocks(w, x, how or Disturbed(), grid, prefix)
    first = norm(w, "local_cls_norm" if local and "local_cls_norm.weight" in w else "norm", x[:prefix])
    return first, norm(w, "norm", x[prefix:])


def blocks(
    w: Weights, x: Tensor, how: Disturbed, grid: tuple[int, int] = (0, 0), prefix: int = 0, *, causal: bool = False
) -> Tensor:
    """All of them on one sequence [n, D], whose tokens after `prefix` are the patches of a grid, if it has any."""
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for number in range(depth):
        block = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{number}.")}
        attention, ffn = how.residuals[number] if how.residuals else (1.0, 1.0)
        angles = _angles(w, grid, how.bends[number] if how.bends else ((0.0, 0.0), (1.0, 1.0)))
        if attention:
            residual = _attention(block, norm(block, "norm1", x), angles, prefix, causal=causal)
            x = x + attention * block.get("ls1.gamma", 1.0) * residual
        if ffn:
            x = x + ffn * block.get("ls2.gamma", 1.0) * _ffn(block, norm(block, "norm2", x))
    return x


def head(w: Weights, x: Tensor) -> Tensor:
    """Scores [K] of one row [D]: three layers, GELU between, L2 norm, prototypes."""
    for layer in (0, 2, 4):
        x = w[f"mlp.{layer}.weight"] @ x + w[f"mlp.{layer}.bias"]
        x = _gelu(x) if layer < 4 else x
    x = x / x.square().sum().sqrt().clamp(min=1e-12)
    if "last_layer.weight" in w:
        return w["last_layer.weight"] @ x
    pairs = zip(w["last_layer.weight_g"], w["last_layer.weight_v"], strict=True)
    return torch.stack([g[0] * (v @ x) / v.square().sum().sqrt() for g, v in pairs])


def _embed(w: Weights, image: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
    """[CLS, registers, patches], with their learnt positions in versions 1 and 2."""
    patches = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            square = image[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            embedded = (w["patch_embed.proj.weight"] * square).sum(dim=(1, 2, 3)) + w["patch_embed.proj.bias"]
            patches.append(w["mask_token"][0] if mask is not None and mask[r * grid[1] + c] else embedded)
    cls, registers = w["cls_token"][0, 0], list(w["storage_tokens"][0]) if "storage_tokens" in w else []
    if "pos_embed" in w:
        cls, table = cls + w["pos_embed"][0, 0], w["pos_embed"][0, 1:]
        side = math.isqrt(len(table))
        places = table if grid == (side, side) else bicubic(table, (side, side), grid, POSITION_OFFSET)
        patches = [patch + place for patch, place in zip(patches, places, strict=True)]
    return torch.stack([cls, *registers, *patches])


def _angles(w: Weights, grid: tuple[int, int], bend: tuple[Pair, Pair]) -> list[Tensor] | None:
    """By how much each patch's channels turn, half a head of them: y's, then x's. None without RoPE."""
    if "rope_embed.periods" not in w:
        return None
    (shift_y, shift_x), (scale_y, scale_x) = bend
    periods, angles = w["rope_embed.periods"], []
    for r in range(grid[0]):
        for c in range(grid[1]):
            y = (2 * (r + 0.5) / grid[0] - 1 + shift_y) * scale_y
            x = (2 * (c + 0.5) / grid[1] - 1 + shift_x) * scale_x
            angles.append(torch.cat([2 * math.pi * y / periods, 2 * math.pi * x / periods]))
    return angles


def _attention(block: Weights, x: Tensor, angles: list[Tensor] | None, prefix: int, *, causal: bool) -> Tensor:
    dim = x.shape[1]
    width = dim // HEADS
    bias = block.get("attn.qkv.bias", torch.zeros(3 * dim).double()).clone()
    if "attn.qkv.bias_mask" in block:
        bias[dim : 2 * dim] = 0  # keys have none
    q, k, v = (x @ block["attn.qkv.weight"].T + bias).split(dim, dim=1)
    out = []
    for number in range(HEADS):
        part = slice(number * width, (number + 1) * width)
        queries, keys = _turn(q[:, part], angles, prefix), _turn(k[:, part], angles, prefix)
        scores = (queries @ keys.T / math.sqrt(width)).exp()
        scores = scores.tril() if causal else scores  # a token sees none that follow it
        out.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
    return torch.cat(out, dim=1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]


def _turn(x: Tensor, angles: list[Tensor] | None, prefix: int) -> Tensor:
    """The channels (i, i + half) of each patch."""
    if angles is None:
        return x
    half = x.shape[1] // 2
    turned = [x[:prefix]]
    for row, angle in zip(x[prefix:], angles, strict=True):
        a, b = row[:half], row[half:]
        turned.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])[None])
    return torch.cat(turned)


def _ffn(block: Weights, x: Tensor) -> Tensor:
    """An MLP, or SwiGLU: w3(silu(w1 x) * w2 x), w1 and w2 one above the other in version 2."""

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ block[f"mlp.{name}.weight"].T + block[f"mlp.{name}.bias"]

    if "mlp.fc1.weight" in block:
        return linear("fc2", _gelu(linear("fc1", x)))
    gate, value = linear("w12", x).chunk(2, dim=1) if "mlp.w12.weight" in block else (linear("w1", x), linear("w2", x))
    return linear("w3", gate / (1 + (-gate).exp()) * value)


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
