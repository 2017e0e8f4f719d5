"""One step of DINOv3's self-distillation (arXiv 2508.10104) as a pure function: losses and gradients of what it sees.

    step(networks, inputs) = for each micro-batch: learn(student, ..., teach(teachers, ...)), then backward

    total = w_dino * (scale_global * L_dino_global + scale_local * local_weight * L_dino_local)     section 3.2
          + w_ibot * L_ibot + w_koleo * 2 * L_koleo + w_gram * L_gram                             section 4.2

with the scales of `losses.dino.crop_scales` and L_koleo the mean over the two global crops. The student sees masked
global crops and local crops; the teacher, its moving average, sees the global crops whole; the Gram teacher, an
earlier teacher, sees them undistorted and, as a rule, larger (section 4.3).

Nothing here knows of a phase, a schedule, a seed or a clock: training (`objectives.ssl`) and replay (`model.replay`)
run the same `teach` and `learn`, the one with what its schedules and draws say, the other with what a file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model import parallel
from model.data.batch import SslBatch
from model.losses.dino import dino_cross_entropy
from model.losses.gram import gram, resize_features
from model.losses.ibot import ibot_cross_entropy, mask_weights
from model.losses.koleo import koleo
from model.losses.sinkhorn import sinkhorn
from model.networks.heads import ProjectionHead
from model.networks.perturb import Perturbation
from model.networks.vit import View, VisionTransformer

GLOBAL_CROPS = 2

Compute = Literal["fp32", "bf16"]


# --- what goes in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trio:
    """A backbone and its two heads: the student, or the teacher."""

    backbone: VisionTransformer
    dino_head: ProjectionHead
    ibot_head: ProjectionHead

    def heads(self) -> dict[str, nn.Module]:
        return {"dino_head": self.dino_head, "ibot_head": self.ibot_head}

    def all(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, **self.heads()}


@dataclass(frozen=True)
class SslNetworks:
    """All that have a say in a step. Only the student's parameters ask for gradients."""

    student: Trio
    teacher: Trio
    gram_teacher: VisionTransformer | None


@dataclass(frozen=True)
class Scalars:
    """The numbers of a step: what the phase's settings and schedules come to at that moment."""

    images: int  # of the global batch, over all ranks and micro-batches
    group_size: int  # consecutive images that are each other's neighbours in KoLeo
    student_temp: float
    teacher_temp: float
    weights: dict[str, float]
    """What each term weighs in `total`: dino_global, dino_local, ibot, koleo, gram. Those of koleo and gram are not
    computed where theirs is 0."""
    momentum: float  # of the moving average that follows the update; no loss depends on it
    compute: Compute = "fp32"  # dtype of the networks' products; float64 networks take "fp32", which changes nothing


@dataclass(frozen=True)
class Draws:
    """What disturbs the student's forward of one micro-batch."""

    of_global: Perturbation  # of 2 b crops
    of_local: Perturbation | None  # of L b crops; None without local crops


@dataclass(frozen=True)
class SslInputs:
    """What one rank's part of a step is made of, beside the networks."""

    batch: SslBatch
    draws: tuple[Draws, ...]  # one a micro-batch: the batch is cut into as many equal parts, in order
    scalars: Scalars
    answers: tuple[Tensor, ...] | None = None
    """What the collectives of `teach` gave this rank, in order. None: ask the other ranks, or there are none."""

    def micro_batches(self) -> Iterator[tuple[int, int, Draws]]:
        """First image, the one after the last, and draws of each."""
        images = len(self.batch.positions) // len(self.draws)
        for number, draws in enumerate(self.draws):
            yield number * images, (number + 1) * images, draws


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SslTargets:
    """What the teachers say of b images."""

    cls: Tensor
    """fp32 [2, b, prototypes]: of the CLS token of each global crop."""
    patches: Tensor
    """fp32 [m, prototypes]: of the m masked patches, in the order of `features[masks]`."""
    images: Tensor
    """int64 [m]: which of the b images each masked patch is of."""
    gram: Tensor | None
    """fp32 [2, b, N, dim]: the Gram teacher's patch features on the student's grid; None where its weight is 0."""
    features: Tensor
    """[2, b, dim]: the teacher's CLS features, for `observe`."""
    logits: Tensor
    """[2, b, prototypes]: what `cls` was made of, at `temperature`, for `observe`."""
    temperature: float

    def slice(self, start: int, stop: int) -> SslTargets:
        """Of the images [start, stop)."""
        inside = (self.images >= start) & (self.images < stop)
        return SslTargets(
            cls=self.cls[:, start:stop],
            patches=self.patches[inside],
            images=self.images[inside] - start,
            gram=None if self.gram is None else self.gram[:, start:stop],
            features=self.features[:, start:stop],
            logits=self.logits[:, start:stop],
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class SslOutputs:
    """A rank's share: summed over the ranks, both are those of the global batch."""

    terms: dict[str, Tensor]  # each loss term by name, unweighted, and `total`
    gradients: dict[str, Tensor]  # of `total`, by parameter: `backbone.blocks.0.norm1.weight`, `dino_head.mlp.0.bias`


@dataclass(frozen=True)
class _Student:
    """What the student says of b images."""

    cls: Tensor  # [2, b, dim]: features of the global crops' CLS tokens, before the head
    patches: Tensor  # [2 b, N, dim]
    global_logits: Tensor  # [2, b, prototypes]
    local_logits: Tensor | None  # [local crops, b, prototypes]; None without local crops
    patch_logits: Tensor  # [m, prototypes]: of the masked patches


# --- the step ---------------------------------------------------------------------------------------------------------


def step(networks: SslNetworks, inputs: SslInputs) -> SslOutputs:
    """A rank's share of the losses and of what backward gives, for its part of the batch. Changes nothing.

    Raises ValueError if the Gram loss has a weight and there is no Gram teacher, or none of its crops.
    """
    batch, scalars = inputs.batch, inputs.scalars
    if inputs.answers is None:
        targets = teach(networks.teacher, networks.gram_teacher, batch, scalars)
    else:
        with parallel.answered(inputs.answers):
            targets = teach(networks.teacher, networks.gram_teacher, batch, scalars)
    parameters = dict(_parameters(networks.student))
    terms: dict[str, Tensor] = {}
    gradients: Sequence[Tensor] = []
    for start, stop, draws in inputs.micro_batches():
        micro = learn(networks.student, batch.slice(start, stop), draws, targets.slice(start, stop), scalars)
        more = torch.autograd.grad(micro["total"], list(parameters.values()), materialize_grads=True)
        gradients = [one + other for one, other in zip(gradients, more, strict=True)] if gradients else more
        terms = {name: term.detach() + terms.get(name, 0) for name, term in micro.items()}
    return SslOutputs(terms, dict(zip(parameters, gradients, strict=True)))


@torch.no_grad()
def teach(teacher: Trio, gram_teacher: VisionTransformer | None, batch: SslBatch, scalars: Scalars) -> SslTargets:
    """What the teachers say of a rank's part of the batch, all micro-batches at once. Every rank calls it: Sinkhorn
    normalises over the global batch."""
    masks = batch.masks.flatten(0, 1)
    with _autocast(batch, scalars.compute):
        features = teacher.backbone.features(batch.global_crops.flatten(0, 1))
        cls_logits = teacher.dino_head(features.cls)
        patch_logits = teacher.ibot_head(features.patches[masks])
    return SslTargets(
        cls=_by_crop(sinkhorn(cls_logits, scalars.teacher_temp), GLOBAL_CROPS),
        patches=sinkhorn(patch_logits, scalars.teacher_temp),
        images=batch.masks.nonzero()[:, 1],
        gram=_gram_targets(gram_teacher, batch, scalars.compute) if scalars.weights["gram"] > 0 else None,
        features=_by_crop(features.cls, GLOBAL_CROPS),
        logits=_by_crop(cls_logits, GLOBAL_CROPS),
        temperature=scalars.teacher_temp,
    )


def learn(student: Trio, batch: SslBatch, draws: Draws, targets: SslTargets, scalars: Scalars) -> dict[str, Tensor]:
    """The loss of one micro-batch: scalars by name, and their weighted sum `total`, as shares of the global loss.

    fp32 (float64 for float64 networks), whatever the dtype of the products.
    """
    images, crops = scalars.images, GLOBAL_CROPS * scalars.images
    said = _student(student, batch, draws, scalars.compute)
    temperature = scalars.student_temp
    weights = mask_weights(batch.masks)
    terms = {
        "dino_global": dino_cross_entropy(said.global_logits, targets.cls, temperature, images, skip_same=True),
        "ibot": ibot_cross_entropy(said.patch_logits, targets.patches, weights, temperature, crops),
    }
    if said.local_logits is not None:
        terms["dino_local"] = dino_cross_entropy(said.local_logits, targets.cls, temperature, images)
    if scalars.weights["koleo"] > 0:
        by_crop = [koleo(features, scalars.group_size, images) for features in said.cls]
        terms["koleo"] = torch.stack(by_crop).mean()
    if targets.gram is not None:
        terms["gram"] = gram(said.patches, targets.gram.flatten(0, 1), crops)
    return {**terms, "total": torch.stack([scalars.weights[name] * term for name, term in terms.items()]).sum()}


def _student(student: Trio, batch: SslBatch, draws: Draws, compute: Compute) -> _Student:
    masks = batch.masks.flatten(0, 1)
    copies = len(batch.local_crops)
    views = [View(batch.global_crops.flatten(0, 1), masks, draws.of_global)]
    if copies:
        views.append(View(batch.local_crops.flatten(0, 1), perturbation=draws.of_local, local=True))
    with _autocast(batch, compute):
        features = student.backbone(views)
        whole = features[0]
        logits = _by_crop(student.dino_head(torch.cat([group.cls for group in features])), GLOBAL_CROPS + copies)
        return _Student(
            cls=_by_crop(whole.cls, GLOBAL_CROPS),
            patches=whole.patches,
            global_logits=logits[:GLOBAL_CROPS],
            local_logits=logits[GLOBAL_CROPS:] if copies else None,
            patch_logits=student.ibot_head(whole.patches[masks]),
        )


def _gram_targets(gram_teacher: VisionTransformer | None, batch: SslBatch, compute: Compute) -> Tensor:
    if gram_teacher is None or batch.gram_crops is None:
        raise ValueError("the Gram loss needs gram_crops in the batch and a phase with a gram_teacher")
    with _autocast(batch, compute):
        patches = gram_teacher.features(batch.gram_crops.flatten(0, 1)).patches
    size = gram_teacher.settings.patch_size
    seen, wanted = _grid(batch.gram_crops, size), _grid(batch.global_crops, size)
    return _by_crop(resize_features(patches, seen, wanted), GLOBAL_CROPS)


def _grid(crops: Tensor, patch_size: int) -> tuple[int, int]:
    return crops.shape[-2] // patch_size, crops.shape[-1] // patch_size


def _autocast(batch: SslBatch, compute: Compute) -> torch.autocast:
    return torch.autocast(batch.global_crops.device.type, dtype=torch.bfloat16, enabled=compute == "bf16")


def _by_crop(rows: Tensor, crops: int) -> Tensor:
    """[crops * b, ...], crop-major, as [crops, b, ...]."""
    return rows.reshape(crops, -1, *rows.shape[1:])


def _parameters(student: Trio) -> Iterator[tuple[str, nn.Parameter]]:
    for network, module in student.all().items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{network}.{name}", parameter
