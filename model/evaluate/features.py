"""Frozen networks and what they say of images: the trained backbone, and the same one with its initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model import config
from model.evaluate.baselines import Images, full
from model.evaluate.scores import Floats
from model.networks.init import create
from model.networks.text import TextTower, VisionHead
from model.networks.vit import VisionTransformer
from model.objectives.base import State, copy_strictly, network_state


@dataclass(frozen=True)
class Extracted:
    """Features of n images after the final norm."""

    cls: Floats  # [n, dim]
    patches: Floats  # [n, patches, dim]

    @property
    def pooled(self) -> Floats:
        """CLS joined with the mean patch [n, 2 * dim], what DINOv2's linear probes read (arXiv 2304.07193, B.3)."""
        return np.concatenate([self.cls, self.patches.mean(axis=1)], axis=1)


@dataclass(frozen=True)
class Aligned:
    """The networks of a text phase."""

    backbone: VisionTransformer
    head: VisionHead
    text: TextTower


def backbone(model: config.Model, seed: int, weights: State | None) -> VisionTransformer:
    """The backbone with `weights` (a teacher_backbone part), or as it was before training."""
    network = create(lambda: VisionTransformer(model.backbone), seed, "backbone").requires_grad_(False).eval()
    if weights is not None:
        network.load_state_dict(weights)
    return network


def aligned(tower: VisionTransformer, phase: config.TextPhase, seed: int, weights: State | None) -> Aligned:
    """Text tower and vision head over `tower`, with `weights` (a text phase's student part) or untrained."""
    settings = tower.settings
    head = create(
        lambda: VisionHead(phase.head, settings.dim, settings.heads, phase.embed_dim), seed, "vision_head"
    ).eval()
    text = create(lambda: TextTower(phase.text, phase.embed_dim), seed, "text_tower").eval()
    if weights is not None:
        towers = {name: tensor for name, tensor in weights.items() if not name.startswith("logit_scale.")}
        copy_strictly(network_state({"vision_head": head, "text_tower": text}), towers, "student")
    return Aligned(tower, head, text)


def _batches(images: Images, data: config.Data, size: int) -> Iterator[Tensor]:
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    for start in range(0, len(images), size):
        pixels = torch.from_numpy(images[start : start + size]).permute(0, 3, 1, 2)
        yield (pixels.float() / full(images) - mean) / std


@torch.inference_mode()
def extract(network: VisionTransformer, images: Images, data: config.Data, batch: int) -> Extracted:
    """Features of `images`."""
    found = [network.features(part) for part in _batches(images, data, batch)]
    cls, patches = (torch.cat([getattr(part, name) for part in found]).numpy() for name in ("cls", "patches"))
    return Extracted(cls, patches)


@torch.inference_mode()
def attention(network: VisionTransformer, images: Images, data: config.Data) -> Floats:
    """Attention of the CLS token in the last block: [n, heads, patches]."""
    maps = [network.cls_attention(part) for part in _batches(images, data, len(images))]
    return torch.cat(maps).flatten(2).numpy()


@torch.inference_mode()
def embed_images(networks: Aligned, images: Images, data: config.Data, batch: int) -> Floats:
    """Embeddings [n, embed_dim], of length 1."""
    parts = [networks.head(networks.backbone.features(part)) for part in _batches(images, data, batch)]
    return F.normalize(torch.cat(parts), dim=-1).numpy()


@torch.inference_mode()
def embed_texts(networks: Aligned, tokens: Tensor, batch: int) -> Floats:
    """Embeddings [n, embed_dim] of token ids [n, context], of length 1."""
    parts = [networks.text(part) for part in torch.split(tokens, batch)]
    return F.normalize(torch.cat(parts), dim=-1).numpy()
