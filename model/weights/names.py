"""The names of other projects, link by link: which tensor there is which, or which third of which, of ours.

Ours are the released ones. The same links lead both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model.config import Backbone
from model.weights import entries as entry, networks
from model.weights.entries import Entries, Entry, WeightsError, compare, shapes

QUERY, KEY, VALUE = 0, 1, 2

MASK_TOKEN = "mask_token"
"""Zeros where a file has none: a backbone that never hid a patch begins so."""


@dataclass(frozen=True)
class Link:
    own: str
    other: str
    part: int | None = None  # this third of ours
    unsqueeze: bool = False  # theirs has a dimension of 1 in front


@dataclass(frozen=True)
class Naming:
    """What one backbone is called elsewhere."""

    links: list[Link]
    made: dict[str, Callable[[torch.dtype], Entry]]  # theirs alone: how to make it
    implied: dict[str, str]  # ours alone: why it needs no place there


def translate(own: Entries, backbone: Backbone, naming: Naming) -> tuple[dict[str, Entry], list[str], list[str]]:
    """Our entries under their names; what was dropped, with the reason; what was made.

    Raises WeightsError if what is dropped as implied by the architecture is not as it implies.
    """
    _check_buffers(own, backbone)
    dtype = own["norm.weight"].dtype
    theirs = {link.other: _forward(own[link.own], link) for link in naming.links}
    theirs |= {name: make(dtype) for name, make in naming.made.items()}
    dropped = [f"{name} ({naming.implied[name]})" for name in own if name in naming.implied]
    dropped += [f"{name} (a head)" for name in own if networks.is_head(name)]
    if backbone.qkv_bias and not any(link.part == KEY and link.own.endswith("bias") for link in naming.links):
        dropped += [f"{name}, the keys' third (masked)" for name in own if name.endswith("attn.qkv.bias")]
    return theirs, dropped, list(naming.made)


def translate_back(theirs: Entries, backbone: Backbone, naming: Naming) -> tuple[dict[str, Entry], list[str]]:
    """Their entries under our names, and what had to be made. Raises WeightsError with every name that does not fit."""
    wanted = networks.expected(backbone)
    there = {link.other: _shape_there(wanted[link.own], link) for link in naming.links}
    ignored = {name for name in naming.made if name in theirs}
    mistakes = compare({name: shape for name, shape in shapes(theirs).items() if name not in ignored}, there)
    values = networks.buffers(backbone)
    mistakes += [f"missing {name}" for name in naming.implied if name not in values and name != MASK_TOKEN]
    if mistakes:
        raise WeightsError("; ".join(mistakes))
    dtype = next(iter(theirs.values())).dtype
    linked: dict[str, list[Link]] = {}
    for link in naming.links:
        linked.setdefault(link.own, []).append(link)
    own: dict[str, Entry] = {}
    made = []
    for name, shape in wanted.items():
        parts = {link.part: theirs[link.other] for link in linked.get(name, [])}
        if None in parts:
            own[name] = entry.reshaped(parts[None], shape)
        elif parts:
            rows = (shape[0] // 3, *shape[1:])
            own[name] = entry.joined([parts.get(part) or entry.filled(rows, dtype, 0.0) for part in range(3)])
        else:
            own[name] = entry.of(values[name]) if name in values else entry.filled(shape, dtype, 0.0)
            made.append(name)
    return own, made


def _forward(own: Entry, link: Link) -> Entry:
    if link.part is not None:
        return entry.third(own, link.part)
    return entry.reshaped(own, (1, *own.shape)) if link.unsqueeze else own


def _shape_there(shape: tuple[int, ...], link: Link) -> tuple[int, ...]:
    if link.part is not None:
        return (shape[0] // 3, *shape[1:])
    return (1, *shape) if link.unsqueeze else shape


def _check_buffers(own: Entries, backbone: Backbone) -> None:
    """Elsewhere these are computed, not stored: what is stored here must be the same."""
    for name, value in networks.buffers(backbone).items():
        if name in own and not torch.allclose(own[name].read().to(value.dtype), value, rtol=0.01):
            raise WeightsError(f"{name} is not what this architecture implies, and has no place in the target")


# --- Hugging Face's DINOv3ViTModel ------------------------------------------------------------------------------------


def huggingface(backbone: Backbone) -> Naming:
    """As DINOv3ViTModel's files say it (`layer.0.attention.q_proj.weight`). Raises WeightsError if it has no place."""
    swiglu = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
    block = {
        "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj", "ls1": "layer_scale1",
        "ls2": "layer_scale2", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj", **swiglu,
    }  # fmt: skip
    outside = {
        "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
        "storage_tokens": "embeddings.register_tokens", "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "norm",
    }  # fmt: skip
    projections = {QUERY: "attention.q_proj", KEY: "attention.k_proj", VALUE: "attention.v_proj"}
    links, implied = [], {}
    for name in networks.expected(backbone):
        head, kind = _split(name)
        prefix, module = _block(head)
        if module == "attn.qkv" and kind in ("weight", "bias"):
            parts = (QUERY, VALUE) if kind == "bias" and backbone.mask_k_bias else (QUERY, KEY, VALUE)
            links += [Link(name, f"layer.{prefix}.{projections[part]}.{kind}", part) for part in parts]
        elif prefix and module in block:
            links.append(Link(name, f"layer.{prefix}.{block[module]}.{'lambda1' if kind == 'gamma' else kind}"))
        elif not prefix and head in outside:
            links.append(Link(name, outside[head] + (f".{kind}" if kind else ""), unsqueeze=name == MASK_TOKEN))
        else:
            implied[name] = _why_implied(name, "Hugging Face's DINOv3ViTModel")
    return Naming(links, dict(_made_for_huggingface(backbone)), implied)


def _made_for_huggingface(backbone: Backbone) -> Iterator[tuple[str, Callable[[torch.dtype], Entry]]]:
    """Hugging Face always has LayerScale, a mask token, and register tokens, be there none."""
    if not backbone.mask_token:
        yield f"embeddings.{MASK_TOKEN}", lambda dtype: entry.filled((1, 1, backbone.dim), dtype, 0.0)
    if backbone.layer_scale is None:
        for name in (f"layer.{i}.layer_scale{n}.lambda1" for i in range(backbone.depth) for n in (1, 2)):
            yield name, lambda dtype: entry.filled((backbone.dim,), dtype, 1.0)
    if not backbone.registers:
        yield "embeddings.register_tokens", lambda dtype: entry.filled((1, 0, backbone.dim), dtype, 0.0)


# --- timm's Eva, as vit_*_dinov3 --------------------------------------------------------------------------------------


def timm(backbone: Backbone) -> Naming:
    """As timm's `vit_*_dinov3` (with a query and value bias `vit_*_dinov3_qkvb`) say it. Raises WeightsError."""
    if backbone.qkv_bias and not backbone.mask_k_bias:
        raise WeightsError("timm has no bias for keys, and this backbone has (mask_k_bias: false)")
    swiglu = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}
    same = ("norm1", "norm2", "attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    block = {**{name: name for name in same}, **swiglu}
    outside = {"cls_token": "cls_token", "storage_tokens": "reg_token", "patch_embed.proj": "patch_embed.proj",
               "norm": "norm"}  # fmt: skip
    links, implied = [], {}
    for name in networks.expected(backbone):
        head, kind = _split(name)
        prefix, module = _block(head)
        if module == "attn.qkv" and kind == "bias":
            links += [Link(name, f"blocks.{prefix}.attn.{bias}", part) for bias, part in _BIASES.items()]
        elif prefix and kind == "gamma":
            links.append(Link(name, f"blocks.{prefix}.gamma_{module[-1]}"))
        elif prefix and module in block and kind in ("weight", "bias"):
            links.append(Link(name, f"blocks.{prefix}.{block[module]}.{kind}"))
        elif not prefix and head in outside:
            links.append(Link(name, outside[head] + (f".{kind}" if kind else "")))
        elif name == MASK_TOKEN:
            implied[name] = "timm hides no patches"
        else:
            implied[name] = _why_implied(name, "timm's Eva")
    return Naming(links, {}, implied)


_BIASES = {"q_bias": QUERY, "v_bias": VALUE}


def _split(name: str) -> tuple[str, str]:
    """`blocks.0.norm1.weight` as (`blocks.0.norm1`, `weight`); a bare token as (`cls_token`, ``)."""
    head, dot, kind = name.rpartition(".")
    return (head, kind) if dot else (name, "")


def _block(head: str) -> tuple[str, str]:
    """`blocks.0.mlp.fc1` as (`0`, `mlp.fc1`); outside of blocks (``, head)."""
    if not head.startswith("blocks."):
        return "", head
    _, number, module = head.split(".", 2)
    return number, module


def _why_implied(name: str, where: str) -> str:
    if name == "rope_embed.periods":
        return "computed from rope_base"
    if name.endswith("attn.qkv.bias_mask"):
        return "keys have no bias there"
    if name.startswith("local_cls_norm."):
        return "for local crops in training alone"
    raise WeightsError(f"{where} has no place for {name}, and gives other features without it")
