"""Parameters, FLOPs and bytes by formula from the configuration, without torch: what `plan` says before anything runs.

Tested against the real networks on the meta device. A multiply-add counts as two FLOPs. Left out, as they are small
beside the rest: norms, softmax, RoPE, optimizer and the losses themselves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from model.config import AnyPhase, Backbone, GramPhase, Head, HighresPhase, Model, Resolution, SslPhase, TextPhase

FP32 = 4
GLOBAL_CROPS = 2
HEAD_FFN_RATIO, HEAD_FFN_ALIGN = 4.0, 64  # of the blocks on top of the frozen vision tower (dino.txt)


# --- parameters -------------------------------------------------------------------------------------------------------


def swiglu_width(dim: int, ratio: float, align: int) -> int:
    """Two thirds of the MLP that it stands for, rounded up to a multiple of `align`."""
    return math.ceil(int(int(dim * ratio) * 2 / 3) / align) * align


def ffn_width(dim: int, kind: str, ratio: float, align: int) -> int:
    """Of the hidden layer of a block's FFN of that kind."""
    return int(dim * ratio) if kind == "mlp" else swiglu_width(dim, ratio, align)


def backbone_parameters(backbone: Backbone) -> int:
    dim = backbone.dim
    tokens = (1 + backbone.mask_token + backbone.registers) * dim  # CLS, mask token, registers
    positions = 0 if backbone.position_grid is None else (1 + backbone.position_grid**2) * dim
    patch_embed = (backbone.channels * backbone.patch_size**2 + 1) * dim
    norms = (2 if backbone.untie_local_cls_norm else 1) * 2 * dim
    return tokens + positions + patch_embed + norms + backbone.depth * _block_parameters(backbone)


def _block_parameters(backbone: Backbone) -> int:
    dim = backbone.dim
    ffn = _ffn_parameters(dim, backbone.ffn, backbone.ffn_ratio, backbone.ffn_align)
    scales = 0 if backbone.layer_scale is None else 2 * dim
    return _attention_parameters(dim, qkv_bias=backbone.qkv_bias) + ffn + scales + 4 * dim


def _attention_parameters(dim: int, *, qkv_bias: bool) -> int:
    return 3 * dim * (dim + qkv_bias) + dim * (dim + 1)


def _ffn_parameters(dim: int, kind: str, ratio: float, align: int) -> int:
    hidden = ffn_width(dim, kind, ratio, align)
    return (1 if kind == "mlp" else 2) * hidden * (dim + 1) + dim * (hidden + 1)


def head_parameters(head: Head, dim: int) -> int:
    """All of them; the lengths of the prototypes are among them where the last layer has weight norm, learnt or not."""
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    mlp = sum((width + 1) * after for width, after in itertools.pairwise(widths))
    return mlp + (head.bottleneck + (head.weight_norm != "none")) * head.prototypes


def _frozen_lengths(head: Head) -> int:
    return head.prototypes if head.weight_norm == "frozen" else 0


def heads_parameters(model: Model) -> int:
    """Of the DINO and the iBOT head together; a tied one counts once."""
    return sum(head_parameters(head, model.backbone.dim) for head in model.heads.values())


def text_tower_parameters(phase: TextPhase) -> int:
    tower, dim = phase.text, phase.text.dim
    block = _attention_parameters(dim, qkv_bias=False) + _ffn_parameters(dim, "mlp", tower.ffn_ratio, 1) + 4 * dim
    return (tower.vocabulary + tower.context) * dim + tower.depth * block + 2 * dim + dim * phase.embed_dim


def vision_head_parameters(phase: TextPhase, backbone: Backbone) -> int:
    dim = backbone.dim
    ffn = _ffn_parameters(dim, "swiglu", HEAD_FFN_RATIO, HEAD_FFN_ALIGN)
    block = _attention_parameters(dim, qkv_bias=False) + ffn + 6 * dim  # LayerScale twice, two norms
    return phase.head.blocks * block + 2 * dim + _vision_projection(phase, backbone)


def _vision_projection(phase: TextPhase, backbone: Backbone) -> int:
    return 0 if 2 * backbone.dim == phase.embed_dim else backbone.dim * (phase.embed_dim // 2)


def trained_parameters(model: Model, phase: AnyPhase) -> int:
    """What the optimizer updates; the 1 of a text phase is its logit scale."""
    if isinstance(phase, TextPhase):
        return text_tower_parameters(phase) + vision_head_parameters(phase, model.backbone) + 1
    frozen = sum(_frozen_lengths(head) for head in model.heads.values())
    return backbone_parameters(model.backbone) + heads_parameters(model) - frozen


# --- bytes ------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(model: Model, phase: AnyPhase) -> dict[str, int]:
    """Bytes of each tensor part of a sealed checkpoint, all fp32 (buffers and file headers left out).

    AdamW keeps two moments a parameter. The frozen parts of a phase (`frozen_parts`) are stored once, not every time.
    """
    trained, backbone = trained_parameters(model, phase) * FP32, backbone_parameters(model.backbone) * FP32
    parts = {"student": trained, "optimizer": 2 * trained, "teacher_backbone": backbone}
    if isinstance(phase, SslPhase):
        parts["teacher_heads"] = heads_parameters(model) * FP32
    if isinstance(phase, GramPhase | HighresPhase):
        parts["gram_teacher"] = backbone
    return parts


def frozen_parts(phase: AnyPhase) -> tuple[str, ...]:
    """Parts that are stored once for all checkpoints of the phase. A Gram teacher that is refreshed is not."""
    if isinstance(phase, TextPhase):
        return ("teacher_backbone",)
    if isinstance(phase, GramPhase | HighresPhase):
        gram = phase.losses.gram
        return () if gram.refresh_every and gram.refresh_most else ("gram_teacher",)
    return ()


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of one image, or of one step's share of it. `blocks` are the transformer blocks, the rest is `other`."""

    blocks: float
    other: float

    @property
    def total(self) -> float:
        return self.blocks + self.other


def patches(backbone: Backbone, side: int) -> int:
    return (side // backbone.patch_size) ** 2


def forward_flops(backbone: Backbone, side: int) -> Flops:
    """One forward of the backbone on a square image of `side` pixels."""
    count, dim = patches(backbone, side), backbone.dim
    embed = 2 * count * dim * backbone.channels * backbone.patch_size**2
    tokens = 1 + backbone.registers + count
    hidden = swiglu_width(dim, backbone.ffn_ratio, backbone.ffn_align)
    ffn = 2 * dim * int(dim * backbone.ffn_ratio) if backbone.ffn == "mlp" else 3 * dim * hidden
    return Flops(backbone.depth * _block_flops(tokens, dim, ffn), embed)


def _block_flops(tokens: int, dim: int, ffn_weights: int) -> float:
    """Linear layers, then attention's two products of tokens by tokens."""
    return 2 * tokens * (4 * dim * dim + ffn_weights) + 4 * tokens * tokens * dim


def head_flops(head: Head, dim: int) -> float:
    """One token through a projection head."""
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return 2.0 * sum(width * after for width, after in itertools.pairwise(widths))


def step_flops(model: Model, phase: AnyPhase) -> float:
    """FLOPs of one training step divided by its images, in expectation over resolutions, masks and drop path."""
    if isinstance(phase, TextPhase):
        return _text_step(model, phase)
    resolutions = phase.crops.resolutions
    weight = sum(resolution.ratio for resolution in resolutions)
    return sum(r.ratio / weight * _ssl_step(model, phase, r) for r in resolutions)


def _ssl_step(model: Model, phase: SslPhase, resolution: Resolution) -> float:
    backbone, local = model.backbone, phase.crops.local_count
    seen = forward_flops(backbone, resolution.global_size), forward_flops(backbone, resolution.local_size)
    linear = backbone.drop_path_depth == "linear"  # from 0 in the first block up
    kept = 1 - backbone.drop_path / (2 if linear else 1)
    blocks = kept * (GLOBAL_CROPS * seen[0].blocks + local * seen[1].blocks)
    ibot = _ibot_head(model, phase, patches(backbone, resolution.global_size))
    dino = head_flops(model.dino_head, backbone.dim)
    heads = ibot + (GLOBAL_CROPS + local) * dino
    embed = GLOBAL_CROPS * seen[0].other + local * seen[1].other
    again = 1 if phase.parallel.activation_checkpointing == "full" else 0
    student = (3 + again) * blocks + 3 * heads + 2 * embed  # images ask for no gradient
    teacher = GLOBAL_CROPS * (seen[0].total + dino) + ibot
    gram = 0.0
    if isinstance(phase, GramPhase | HighresPhase):
        gram = GLOBAL_CROPS * forward_flops(backbone, resolution.gram_size or resolution.global_size).total
    return student + teacher + gram


def _ibot_head(model: Model, phase: SslPhase, patches_: int) -> float:
    """One forward of the masked patches of the global crops of an image through their head."""
    if not phase.losses.ibot.weight:
        return 0.0
    low, high = phase.losses.ibot.mask_ratio
    masked = phase.losses.ibot.mask_probability * (low + high) / 2 * patches_
    head = model.heads.get("ibot_head", model.dino_head)
    return GLOBAL_CROPS * masked * head_flops(head, model.backbone.dim)


def _text_step(model: Model, phase: TextPhase) -> float:
    """The frozen tower once. What is trained goes forward twice (the whole batch's embeddings first), backward once."""
    backbone, tower = model.backbone, phase.text
    frozen = forward_flops(backbone, phase.image_size).total
    tokens = 1 + backbone.registers + patches(backbone, phase.image_size)
    ffn = 3 * backbone.dim * swiglu_width(backbone.dim, HEAD_FFN_RATIO, HEAD_FFN_ALIGN)
    kept = 1 - phase.head.drop_path
    vision = phase.head.blocks * kept * _block_flops(tokens, backbone.dim, ffn) + 4 * _vision_projection(
        phase, backbone
    )
    block = _block_flops(tower.context, tower.dim, 2 * tower.dim * int(tower.dim * tower.ffn_ratio))
    text = tower.depth * block + 2 * tower.dim * phase.embed_dim
    return frozen + 4 * (vision + text)
