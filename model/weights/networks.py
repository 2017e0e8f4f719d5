"""Which tensors a backbone has, under our names (the released ones), and which backbone some tensors are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from model import config
from model.architectures import ARCHITECTURES
from model.config import Backbone
from model.networks.init import initial_rules
from model.networks.vit import VisionTransformer
from model.weights.entries import Entries, WeightsError, shapes

Shapes = Mapping[str, tuple[int, ...]]

HEADS = ("dino_head", "ibot_head")
CENTERS = ("dino_center", "ibot_center")


def named(arch: str, **changes: Any) -> Backbone:
    """The released architecture of that name."""
    return config.read(Backbone, {"arch": arch, **changes})


def meta(backbone: Backbone) -> VisionTransformer:
    """The network without memory: of 7B in about a second."""
    with torch.device("meta"):
        return VisionTransformer(backbone)


def expected(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone's tensors, buffers included."""
    return {name: tuple(tensor.shape) for name, tensor in meta(backbone).state_dict().items()}


def buffers(backbone: Backbone) -> dict[str, Tensor]:
    """What no training changes, by name: RoPE's wavelengths and the masks of the key biases."""
    network = meta(backbone)
    rules = initial_rules(network)
    values = {}
    for name, tensor in network.named_buffers():
        rule = rules[name]
        assert isinstance(rule, Tensor), f"{name}: a buffer that is drawn"
        values[name] = rule.to(tensor.dtype)
    return values


def is_head(name: str) -> bool:
    return name.split(".", 1)[0] in HEADS


def is_center(name: str) -> bool:
    """Whether it is a running centre of the teacher's logits (`centering: centering`): a loss's, and of no network."""
    return name.split(".", 1)[0] in CENTERS


def recognise(entries: Entries) -> Backbone:
    """The backbone that entries under our names are of: a released architecture, or a `custom` one.

    Not in any file are norm_eps, taken as that of the released architecture, else as 1e-5, and what only training knows
    (drop path, RoPE augmentation, the initial LayerScale). Raises WeightsError if there is no such backbone.
    """
    found = {name: shape for name, shape in shapes(entries).items() if not is_head(name)}
    known = released(found)
    backbone = known if known is not None else _custom(entries, found)
    if "rope_embed.periods" in entries:
        base = _rope_base(entries["rope_embed.periods"].read().float(), backbone)
        backbone = backbone.model_copy(update={"rope_base": base})
    return backbone


PATCHES = "patch_embed.proj.weight"


def with_channels(backbone: Backbone, entries: Entries) -> Backbone:
    """`backbone` for images of as many channels as these weights, under our names, are made for."""
    shape = entries[PATCHES].shape if PATCHES in entries else ()
    return backbone.model_copy(update={"channels": shape[1]}) if len(shape) == 4 else backbone


def released(found: Shapes) -> Backbone | None:
    """The released architecture of exactly these names and shapes, if there is one."""
    for arch in ARCHITECTURES:
        if arch != "custom":
            backbone = named(arch)
            if found.get("cls_token", (0,))[-1] == backbone.dim and expected(backbone) == dict(found):
                return backbone
    return None


def _custom(entries: Entries, found: Shapes) -> Backbone:
    try:
        dim = found["cls_token"][-1]
        periods = found["rope_embed.periods"][0]
        proj = found["patch_embed.proj.weight"]
        depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
        swiglu = "blocks.0.mlp.w1.weight" in found
        hidden = found["blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight"][0]
        return Backbone(
            arch="custom", dim=dim, depth=depth, heads=dim // (4 * periods), patch_size=proj[-1], channels=proj[1],
            registers=found["storage_tokens"][1] if "storage_tokens" in found else 0,
            qkv_bias="blocks.0.attn.qkv.bias" in found, mask_k_bias="blocks.0.attn.qkv.bias_mask" in found,
            layer_scale=1e-5 if "blocks.0.ls1.gamma" in found else None,
            untie_local_cls_norm="local_cls_norm.weight" in found, **ffn(swiglu, hidden, dim),
        )  # fmt: skip
    except (KeyError, IndexError) as error:
        raise WeightsError(f"no vision transformer of this kind: there is no {error}") from error
    except ValidationError as error:
        raise WeightsError(f"no vision transformer of this kind: {error}") from error


def ffn(swiglu: bool, hidden: int, dim: int) -> dict[str, Any]:
    """The settings that make a feed-forward layer this wide."""
    if not swiglu:
        return {"ffn": "mlp", "ffn_ratio": ratio(hidden, dim)}
    align = math.gcd(hidden, 64)  # rounding up to it makes up for what float division loses
    return {"ffn": "swiglu", "ffn_ratio": 1.5 * hidden / dim, "ffn_align": align}


def ratio(hidden: int, dim: int) -> float:
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _rope_base(periods: Tensor, backbone: Backbone) -> float:
    """The base that these wavelengths are powers of. Training keeps them in bf16, which is right to 1 in 256."""
    count = len(periods)
    if count < 2:
        return backbone.rope_base
    base = float(periods[-1]) ** (count / (count - 1))
    near = backbone.rope_base if math.isclose(base, backbone.rope_base, rel_tol=0.02) else base
    rule = torch.pow(torch.tensor(near), torch.arange(count) / count)
    if not torch.allclose(periods, rule, rtol=0.01):
        raise WeightsError(f"rope_embed.periods are not powers of one base: {periods.tolist()}")
    return near
