"""What other projects keep beside the tensors: the settings of the network, and how images are prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model import contract
from model.architectures import ARCHITECTURES
from model.config import NORMALISATIONS, Backbone
from model.weights import names, networks
from model.weights.entries import WeightsError

Settings = dict[str, Any]


class Prepared(contract.Record, frozen=True):
    """How images are made into a network's input: divided by the largest number of `bits` bits, then normalised."""

    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


BICUBIC = 3
"""PIL's number of the filter that official evaluations resize with."""


def to_huggingface(backbone: Backbone) -> Settings:
    """config.json of a DINOv3ViTModel."""
    return {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "hidden_size": backbone.dim,
        "intermediate_size": _hidden(backbone),
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "hidden_act": "silu" if backbone.ffn == "swiglu" else "gelu",
        "use_gated_mlp": backbone.ffn == "swiglu",
        "layer_norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_base,
        "image_size": 14 * backbone.patch_size,
        "patch_size": backbone.patch_size,
        "num_channels": backbone.channels,
        "num_register_tokens": backbone.registers,
        "query_bias": backbone.qkv_bias,
        "key_bias": backbone.qkv_bias and not backbone.mask_k_bias,
        "value_bias": backbone.qkv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": backbone.layer_scale or 1.0,
        "drop_path_rate": 0.0,
        "pos_embed_shift": backbone.rope_shift,
        "pos_embed_jitter": backbone.rope_jitter,
        "pos_embed_rescale": backbone.rope_rescale,
    }


def preprocessor(images: Prepared, size: int) -> Settings:
    """preprocessor_config.json: AutoImageProcessor's, in transformers 4 and 5."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / largest(images.bits),
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


def largest(bits: int) -> int:
    return int(2**bits - 1)


def prepared(path: Path, timm: Mapping[str, Any]) -> Prepared | None:
    """As a preprocessor_config.json or timm's config.json says it; None if neither does."""
    told = {"bits": timm.get("image_bits", 8), **timm.get("pretrained_cfg", {})}
    if path.exists():
        values = json.loads(path.read_bytes())
        bits = 16 if values.get("rescale_factor", 1) <= 1 / largest(16) else 8
        told = {"bits": bits, "mean": values.get("image_mean"), "std": values.get("image_std")}
    if not told.get("mean") or not told.get("std"):
        return None
    return Prepared(told["bits"], tuple(told["mean"]), tuple(told["std"]))


IMAGENET = Prepared(8, *NORMALISATIONS["imagenet"])
"""What the released models were trained with."""


def from_huggingface(settings: Mapping[str, Any]) -> Backbone:
    """The backbone of a config.json. Raises WeightsError for one that is no DINOv3 ViT, or one that we cannot build."""
    if settings.get("model_type") != "dinov3_vit":
        raise WeightsError(f"config.json: model_type is {settings.get('model_type')!r}, and dinov3_vit is what is read")
    swiglu = settings.get("use_gated_mlp", False)
    wanted = {"proj_bias": True, "mlp_bias": True, "hidden_act": "silu" if swiglu else "gelu"}
    if wrong := [f"{key}: {settings[key]}" for key, value in wanted.items() if settings.get(key, value) != value]:
        raise WeightsError(f"config.json: a backbone that dinoctl cannot build: {', '.join(wrong)}")
    bias, key_bias = settings.get("query_bias", True), settings.get("key_bias", False)
    if bias != settings.get("value_bias", True) or (key_bias and not bias):
        raise WeightsError("config.json: queries and values must both have a bias, or neither (and then no keys)")
    dim = settings.get("hidden_size", 384)
    return _build(
        dim=dim,
        depth=settings.get("num_hidden_layers", 12),
        heads=settings.get("num_attention_heads", 6),
        patch_size=settings.get("patch_size", 16),
        channels=settings.get("num_channels", 3),
        registers=settings.get("num_register_tokens", 0),
        qkv_bias=bias,
        mask_k_bias=not key_bias,
        layer_scale=settings.get("layerscale_value", 1.0),
        norm_eps=settings.get("layer_norm_eps", 1e-5),
        rope_base=float(settings.get("rope_theta", 100.0)),
        **networks.ffn(swiglu, settings.get("intermediate_size", 1536), dim),
    )


def to_timm(backbone: Backbone, images: Prepared) -> Settings:
    """config.json of a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    swiglu = backbone.ffn == "swiglu"
    size = 14 * backbone.patch_size
    return {
        "architecture": f"vit_small{'_plus' if swiglu else ''}_patch16_dinov3{'_qkvb' if backbone.qkv_bias else ''}",
        "num_classes": 0,
        "num_features": backbone.dim,
        "image_bits": images.bits,  # which timm has no place for
        "model_args": {
            "img_size": size,
            "patch_size": backbone.patch_size,
            "in_chans": backbone.channels,
            "embed_dim": backbone.dim,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": networks.ratio(_hidden(backbone), backbone.dim),
            "init_values": backbone.layer_scale,
            "num_reg_tokens": backbone.registers,
            "rope_temperature": backbone.rope_base,
            "swiglu_align_to": 1 if swiglu else 0,
        },
        "pretrained_cfg": {
            "input_size": [backbone.channels, size, size],
            "mean": list(images.mean),
            "std": list(images.std),
            "interpolation": "bicubic",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


TIMM_EPS = 1e-5
"""norm_eps of timm's DINOv3 models; no config.json of theirs can say another."""


def from_timm(found: networks.Shapes, settings: Mapping[str, Any], like: Backbone | None) -> Backbone:
    """The backbone of timm's tensors: by config.json, like `like`, or as the released one of these shapes.

    Raises WeightsError if none of these tells.
    """
    arguments = settings.get("model_args", {})
    if {"embed_dim", "num_heads", "depth"} <= arguments.keys():
        swiglu = "blocks.0.mlp.fc1_g.weight" in found
        hidden = found["blocks.0.mlp.fc1_g.weight" if swiglu else "blocks.0.mlp.fc1.weight"][0]
        patch = found["patch_embed.proj.weight"]
        return _build(
            dim=arguments["embed_dim"], depth=arguments["depth"], heads=arguments["num_heads"], patch_size=patch[-1],
            channels=patch[1], registers=found["reg_token"][1] if "reg_token" in found else 0,
            qkv_bias="blocks.0.attn.q_bias" in found, layer_scale=arguments.get("init_values", 1e-5),
            rope_base=float(arguments.get("rope_temperature", 100.0)),
            **networks.ffn(swiglu, hidden, arguments["embed_dim"]),
        )  # fmt: skip
    known = {"untie_local_cls_norm": False, "qkv_bias": "blocks.0.attn.q_bias" in found}
    if like is not None:
        return like.model_copy(update={**known, "channels": found["patch_embed.proj.weight"][1]})
    for name, row in ARCHITECTURES.items():
        if row.get("dim") == found.get("cls_token", (0,))[-1] and row.get("positions") != "learned":
            backbone = networks.named(name, **known)
            if {link.other for link in names.timm(backbone).links} == set(found):
                return backbone
    raise WeightsError("timm's names, of no released size, and no config.json beside them that tells the heads")


def _hidden(backbone: Backbone) -> int:
    block = networks.expected(backbone.model_copy(update={"depth": 1}))
    return block["blocks.0.mlp.w1.weight" if backbone.ffn == "swiglu" else "blocks.0.mlp.fc1.weight"][0]


def _build(**values: Any) -> Backbone:
    """`custom`, or the released architecture that it is, but for what only its training differs in."""
    try:
        return Backbone(arch="custom", **values)
    except ValidationError as error:
        raise WeightsError(f"config.json: a backbone that dinoctl cannot build: {error}") from error
