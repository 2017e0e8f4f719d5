"""The released vision transformers by name, as fields of `config.Backbone`. No torch, no pydantic.

The names are those under which Meta released the weights: `vits16` ... for DINOv3 (a plain name), `dinov2_*`, `dino_*`.
"""

from __future__ import annotations

from typing import Any

S = {"dim": 384, "depth": 12, "heads": 6}
B = {"dim": 768, "depth": 12, "heads": 12}
L = {"dim": 1024, "depth": 24, "heads": 16}
G = {"dim": 1536, "depth": 40, "heads": 24}

PLUS = {"ffn": "swiglu", "ffn_ratio": 6.0}

LEARNED = {"positions": "learned", "registers": 0, "mask_k_bias": False, "norm_eps": 1e-6}

V1 = {**LEARNED, "position_grid": 14, "layer_scale": None, "drop_path_depth": "linear", "mask_token": False}
"""Trained at 224 pixels: 14 x 14 patches of 16."""

V2 = {**LEARNED, "position_grid": 37, "patch_size": 14, "token_std": 1e-6}
"""Released at 518 pixels: 37 x 37 patches of 14."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vits16": S,
    "vits16plus": {**S, **PLUS},
    "vitb16": B,
    "vitl16": L,
    "vitl16plus": {**L, **PLUS},
    "vith16plus": {"dim": 1280, "depth": 32, "heads": 20, **PLUS},
    "vit7b16": {
        "dim": 4096, "depth": 40, "heads": 32, "ffn": "swiglu", "ffn_ratio": 3.0, "ffn_align": 64,
        "qkv_bias": False, "untie_local_cls_norm": True,
    },
    "dino_vits16": {**S, **V1},
    "dino_vitb16": {**B, **V1},
    "dino_vitl16": {**L, **V1},
    "dinov2_vits14": {**S, **V2},
    "dinov2_vitb14": {**B, **V2},
    "dinov2_vitl14": {**L, **V2},
    "dinov2_vitg14": {**G, **V2, "ffn": "swiglu_fused"},
    "custom": {},
}  # fmt: skip
"""What a job says beside `arch` overrides the row; `custom` has no row and must say all."""
