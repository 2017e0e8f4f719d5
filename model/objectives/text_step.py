"""One step of text alignment (dino.txt, arXiv 2412.16334, section 3) as a pure function, as `objectives.step` is one.

The total is CLIP's loss (`losses.contrastive`) of the pairs of the global batch, between what a head says of a frozen
vision tower's features and what a text tower says of the captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from model import config, parallel
from model.data.batch import PairBatch
from model.losses.contrastive import contrastive
from model.losses.precision import promote
from model.networks.perturb import Perturbation
from model.networks.text import LogitScale, TextTower, VisionHead
from model.networks.vit import Features, VisionTransformer
from model.objectives.pure import Compute, Inputs, Outputs, add_up


class Towers(config.Section):
    """How the networks that text alignment adds are built."""

    embed_dim: PositiveInt
    text: config.TextTower
    head: config.VisionHead


@dataclass(frozen=True)
class TextNetworks:
    """All that have a say in a step. Only those that are trained ask for gradients."""

    tower: VisionTransformer  # frozen
    head: VisionHead
    text: TextTower
    scale: LogitScale

    def trained(self) -> dict[str, nn.Module]:
        return {"vision_head": self.head, "text_tower": self.text, "logit_scale": self.scale}

    def named(self) -> dict[str, nn.Module]:
        """See `objectives.pure`. The vision tower has the name of the EMA teacher, of which it is a copy."""
        trained = {f"student.{name}": network for name, network in self.trained().items()}
        return {**trained, "teacher.backbone": self.tower}


@dataclass(frozen=True)
class TextScalars:
    images: int  # of the global batch, over all ranks and micro-batches
    compute: Compute = "fp32"  # dtype of the networks' products; float64 networks take "fp32", which changes nothing


@dataclass(frozen=True)
class TextDraws:
    """What disturbs the vision head's forward of some images."""

    of_image: Perturbation


TextInputs = Inputs[PairBatch, TextDraws, TextScalars]


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


def step(networks: TextNetworks, inputs: TextInputs) -> Outputs:
    """A rank's share of the loss and of what backward gives, for its part of the batch. Changes nothing."""

    def loss(batch: PairBatch, draws: TextDraws, targets: TextTargets) -> dict[str, Tensor]:
        return learn(networks, batch, draws, targets, inputs.scalars)

    with inputs.collectives():
        targets = teach(networks, inputs.batch, _joined(inputs.draws, len(inputs.batch.positions)), inputs.scalars)
        return add_up(networks.trained(), inputs, targets, loss)


@torch.no_grad()
def teach(networks: TextNetworks, batch: PairBatch, draws: TextDraws, scalars: TextScalars) -> TextTargets:
    """The tower's features of a rank's part of the batch, once, and every embedding of the global batch as `learn`
    will see it again. Every rank calls it; `batch.groups` says which part it has."""
    with _autocast(batch.images, scalars.compute):
        features = networks.tower.features(batch.images)
    images, texts = _embed(networks, batch, features, draws, scalars)
    group_size = len(batch.positions) // len(batch.groups)
    first = int(batch.groups[0]) * group_size
    return TextTargets(features, parallel.all_gather(images), parallel.all_gather(texts), first)


def learn(
    networks: TextNetworks, batch: PairBatch, draws: TextDraws, targets: TextTargets, scalars: TextScalars
) -> dict[str, Tensor]:
    """The loss of one micro-batch, a share of the global one: `contrastive`, and with gradients `total`."""
    images, texts = _embed(networks, batch, targets.features, draws, scalars)
    total = contrastive(images, texts, networks.scale(), targets.images, targets.texts, targets.first)
    return {"contrastive": total.detach(), "total": total}


def _embed(
    networks: TextNetworks, batch: PairBatch, features: Features, draws: TextDraws, scalars: TextScalars
) -> tuple[Tensor, Tensor]:
    """Normalised [n, embed_dim] of images and captions, fp32 (float64 of float64 networks)."""
    with _autocast(batch.images, scalars.compute):
        images = networks.head(features, draws.of_image)
        texts = networks.text(batch.tokens)
    return F.normalize(promote(images), dim=-1), F.normalize(promote(texts), dim=-1)


def _joined(parts: Sequence[TextDraws], images: int) -> TextDraws:
    """The draws of a batch of so many images from those of its equal micro-batches, in order."""
    first, size = parts[0].of_image, images // len(parts)
    if first.indices is None:
        return parts[0]
    kept = [part.of_image.indices for part in parts]
    shifted = [indices + number * size for number, indices in enumerate(kept) if indices is not None]
    return TextDraws(replace(first, indices=torch.cat(shifted, dim=2)))


def _autocast(images: Tensor, compute: Compute) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=compute == "bf16")
