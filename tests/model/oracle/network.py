"""DINOv3's student and teacher again, one crop at a time, from tensors by name. Imports nothing of model/."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]

HEADS, PATCH, EPS = 2, 4, 1e-5


@dataclass(frozen=True)
class Disturbed:
    """What one crop suffers in training."""

    shift: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    keeps: tuple[tuple[bool, bool], ...] = ()  # by block: whether attention and FFN have their residual; (): all
    factor: float = 1.0  # of the residuals that are kept


def backbone(w: Weights, image: Tensor, mask: Tensor | None = None, how: Disturbed | None = None, *, local: bool = False
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised CLS [D] and patches [N, D] of an image [3, H, W]; mask: bool [N]."""
    how = how or Disturbed()
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    tokens = [w["cls_token"][0, 0], *w["storage_tokens"][0]]
    prefix = len(tokens)
    for r in range(rows):
        for c in range(columns):
            square = image[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            embedded = (w["patch_embed.proj.weight"] * square).sum(dim=(1, 2, 3)) + w["patch_embed.proj.bias"]
            tokens.append(w["mask_token"][0] if mask is not None and mask[r * columns + c] else embedded)
    x = torch.stack(tokens)
    places = [((2 * (r + 0.5) / rows - 1), (2 * (c + 0.5) / columns - 1)) for r in range(rows) for c in range(columns)]
    places = [((y + how.shift[0]) * how.scale[0], (z + how.shift[1]) * how.scale[1]) for y, z in places]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for number in range(depth):
        block = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{number}.")}
        attends, thinks = how.keeps[number] if how.keeps else (True, True)
        if attends:
            x = x + how.factor * block["ls1.gamma"] * _attention(block, _norm(block, "norm1", x), places, prefix, w)
        if thinks:
            x = x + how.factor * block["ls2.gamma"] * _mlp(block, _norm(block, "norm2", x))
    first = _norm(w, "local_cls_norm" if local else "norm", x[:prefix])
    return first[0], _norm(w, "norm", x[prefix:])


def head(w: Weights, x: Tensor) -> Tensor:
    """Scores [K] of one row [D]: three layers, GELU between, L2 norm, prototypes."""
    for layer in (0, 2, 4):
        x = w[f"mlp.{layer}.weight"] @ x + w[f"mlp.{layer}.bias"]
        x = _gelu(x) if layer < 4 else x
    return w["last_layer.weight"] @ (x / x.square().sum().sqrt().clamp(min=1e-12))


def _attention(block: Weights, x: Tensor, places: list[tuple[float, float]], prefix: int, w: Weights) -> Tensor:
    dim = x.shape[1]
    width = dim // HEADS
    bias = block["attn.qkv.bias"].clone()
    bias[dim : 2 * dim] = 0  # keys have none
    q, k, v = (x @ block["attn.qkv.weight"].T + bias).split(dim, dim=1)
    out = []
    for number in range(HEADS):
        part = slice(number * width, (number + 1) * width)
        queries = _rope(q[:, part], places, prefix, w["rope_embed.periods"])
        keys = _rope(k[:, part], places, prefix, w["rope_embed.periods"])
        scores = (queries @ keys.T / math.sqrt(width)).exp()
        out.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
    return torch.cat(out, dim=1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]


def _rope(x: Tensor, places: list[tuple[float, float]], prefix: int, periods: Tensor) -> Tensor:
    """Turn the channels (i, i + half) of each patch; the first quarter of the angles is y's, the second x's."""
    half = x.shape[1] // 2
    turned = [x[:prefix]]
    for row, (y, z) in zip(x[prefix:], places, strict=True):
        angle = torch.cat([2 * math.pi * y / periods, 2 * math.pi * z / periods])
        a, b = row[:half], row[half:]
        turned.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])[None])
    return torch.cat(turned)


def _mlp(block: Weights, x: Tensor) -> Tensor:
    hidden = _gelu(x @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
    return hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
