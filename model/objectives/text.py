"""Text alignment (dino.txt, arXiv 2412.16334): a text tower and a few blocks learn to agree over a frozen backbone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model import config, parallel
from model.data.batch import PairBatch
from model.data.views import PairViews
from model.losses.contrastive import contrastive
from model.networks.init import create
from model.networks.perturb import Layout, Perturbation, drop_path
from model.networks.text import LogitScale, TextTower, VisionHead
from model.networks.vit import Features, VisionTransformer
from model.objectives.base import Moment, Networks, ReadPart, State, copy_strictly, network_state


@dataclass(frozen=True)
class TextTargets:
    """The frozen tower's features of some images, and every embedding of the global batch."""

    features: Features  # of these images
    images: Tensor  # fp32 [global batch, embed_dim], normalised
    texts: Tensor  # fp32 [global batch, embed_dim], normalised
    first: int  # these images are [first, first + n) of the global batch

    def slice(self, start: int, stop: int) -> TextTargets:
        part = slice(start, stop)
        features = Features(self.features.cls[part], self.features.registers[part], self.features.patches[part])
        return TextTargets(features, self.images, self.texts, self.first + start)


class TextObjective:
    """Contrastive loss of images and captions. There is no teacher; the vision tower stays as it was handed over."""

    def __init__(self, settings: config.TextPhase, model: config.Model, seed: int, origin: str) -> None:
        backbone = model.backbone
        self._settings, self._seed, self._origin = settings, seed, origin
        self._tower = create(lambda: VisionTransformer(backbone), seed, "backbone").requires_grad_(False)
        self._head = create(
            lambda: VisionHead(settings.head, backbone.dim, backbone.heads, settings.embed_dim), seed, "vision_head"
        )
        self._text = create(lambda: TextTower(settings.text, settings.embed_dim), seed, "text_tower")
        self._scale = create(LogitScale, seed, "logit_scale")
        self._networks = Networks(
            trained={"vision_head": self._head, "text_tower": self._text, "logit_scale": self._scale},
            frozen={"vision_tower": self._tower},
        )

    def networks(self) -> Networks:
        return self._networks

    def views(self, clock: int) -> PairViews:
        return PairViews(self._settings.image_size, self._settings.text.context)

    @torch.no_grad()
    def targets(self, batch: PairBatch, moment: Moment) -> TextTargets:
        """The tower's features once, then every embedding of the global batch as `loss` will see it again."""
        with self._autocast(batch.images):
            features = self._tower.features(batch.images)
        images, texts = self._embed(batch, features, moment)
        return TextTargets(
            features,
            parallel.all_gather(images),
            parallel.all_gather(texts),
            first=parallel.rank() * len(images),
        )

    def loss(self, batch: PairBatch, targets: TextTargets, moment: Moment) -> dict[str, Tensor]:
        images, texts = self._embed(batch, targets.features, moment)
        total = contrastive(images, texts, self._scale(), targets.images, targets.texts, targets.first)
        return {"contrastive": total.detach(), "total": total}

    def after_step(self, moment: Moment) -> None:
        """Nothing follows: there is no teacher."""

    def state(self) -> dict[str, State]:
        return {"student": network_state(self._networks.trained), "teacher_backbone": self._tower.state_dict()}

    def load(self, part: str, tensors: State) -> None:
        own = self.state()
        if part not in own:
            raise ValueError(f"a text phase has no part {part}; it has {', '.join(own)}")
        copy_strictly(own[part], tensors, part)

    def frozen_parts(self) -> set[str]:
        return {"teacher_backbone"}

    def take(self, name: str, read: ReadPart) -> None:
        if name != "vision_tower":
            raise ValueError(f"a text phase takes a vision_tower, not {name}")
        self.load("teacher_backbone", read("teacher_backbone"))

    def _embed(self, batch: PairBatch, features: Features, moment: Moment) -> tuple[Tensor, Tensor]:
        """Normalised fp32 [n, embed_dim] of images and captions, under the drop path of that step."""
        with self._autocast(batch.images):
            images = self._head(features, self._drop_path(batch, moment))
            texts = self._text(batch.tokens)
        return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)

    def _drop_path(self, batch: PairBatch, moment: Moment) -> Perturbation:
        head = self._settings.head
        layout = Layout("image", batch.groups.tolist(), self._settings.optim.group_size, copies=1)
        indices, scale = drop_path(head.drop_path, head.blocks, layout, self._seed, self._origin, moment.clock)
        return Perturbation(None, indices, scale).to(batch.images.device)

    def _autocast(self, images: Tensor) -> torch.autocast:
        enabled = self._settings.precision.compute == "bf16"
        return torch.autocast(images.device.type, torch.bfloat16, enabled=enabled)
