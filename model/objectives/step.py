"""One step of DINOv3's self-distillation (arXiv 2508.10104) as a pure function: losses and gradients of what it sees.

    step(networks, inputs) = for each micro-batch: learn(student, ..., teach(teachers, ...)), then backward

    total = w_dino * (scale_global * L_dino_global + scale_local * local_weight * L_dino_local)     section 3.2
          + w_ibot * L_ibot + w_koleo * 2 * L_koleo + w_gram * L_gram                             section 4.2

with the scales of `losses.dino.crop_scales` and L_koleo the mean over the two global crops. The student sees masked
global crops and local crops; the teacher, its moving average, sees the global crops whole; the Gram teacher, an
earlier teacher, sees them undistorted and, as a rule, larger (section 4.3).

Nothing here knows of a phase, a schedule, a seed or a clock: training (`objectives.ssl`) and replay (`model.replay`)
run the same `teach` and `learn` (`objectives.pure`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import parallel
from model.data.batch import SslBatch
from model.losses.centering import Center, batch_mean, centered
from model.losses.dino import dino_cross_entropy
from model.losses.gram import Clamp, as_groups, gram, resize_features
from model.losses.ibot import ibot_cross_entropy, mask_weights
from model.losses.koleo import koleo, koleo_gathered
from model.losses.precision import promote
from model.losses.sinkhorn import sinkhorn
from model.networks.heads import ProjectionHead
from model.networks.perturb import Perturbation
from model.networks.vit import Features, View, VisionTransformer
from model.objectives.pure import Compute, Inputs, Outputs, add_up

GLOBAL_CROPS = 2

Centering = Literal["sinkhorn", "centering", "none"]


# --- what goes in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trio:
    """A backbone and its heads: the student, or the teacher, which may have centres too."""

    backbone: VisionTransformer
    dino_head: ProjectionHead
    ibot_head: ProjectionHead | None  # of the masked patches; the DINO head itself if they are tied
    dino_center: Center | None = None
    ibot_center: Center | None = None

    def heads(self) -> dict[str, nn.Module]:
        """Each once, by name; the centres are among the teacher's."""
        separate = None if self.ibot_head is self.dino_head else self.ibot_head
        named: dict[str, nn.Module | None] = {
            "dino_head": self.dino_head, "ibot_head": separate,
            "dino_center": self.dino_center, "ibot_center": self.ibot_center,
        }  # fmt: skip
        return {name: module for name, module in named.items() if module is not None}

    def all(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, **self.heads()}


@dataclass(frozen=True)
class SslNetworks:
    """All that have a say in a step. Only the student's parameters ask for gradients."""

    student: Trio
    teacher: Trio
    gram_teacher: VisionTransformer | None

    def named(self) -> dict[str, nn.Module]:
        """See `objectives.pure`."""
        gram_teacher = {} if self.gram_teacher is None else {"gram_teacher.backbone": self.gram_teacher}
        return {
            **{f"student.{name}": network for name, network in self.student.all().items()},
            **{f"teacher.{name}": network for name, network in self.teacher.all().items()},
            **gram_teacher,
        }


@dataclass(frozen=True)
class Scalars:
    """The numbers of a step: what the phase's settings and schedules come to at that moment."""

    images: int  # of the global batch, over all ranks and micro-batches
    group_size: int  # consecutive images that are each other's neighbours in KoLeo
    student_temp: float
    teacher_temp: float
    weights: dict[str, float]
    """What each term weighs in `total`: dino_global, dino_local, ibot, koleo, gram. Those of ibot, koleo and gram are
    not computed where theirs is 0, and without iBOT nothing is masked."""
    momentum: float  # of the moving average that follows the update; no loss depends on it
    compute: Compute = "fp32"  # dtype of the networks' products; float64 networks take "fp32", which changes nothing
    centering: Centering = "sinkhorn"
    gram_group: int = 0  # images whose patches meet in one Gram matrix, with all their crops; 0: each crop alone
    gram_clamp: Clamp = "none"
    official_quirks: bool = False  # as the released code does where it differs (docs/parity.md)


@dataclass(frozen=True)
class Draws:
    """What disturbs the student's forward of one micro-batch."""

    of_global: Perturbation  # of 2 b crops
    of_local: Perturbation | None = None  # of L b crops; None without local crops


SslInputs = Inputs[SslBatch, Draws, Scalars]


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
    closeness: Tensor
    """fp32 [2, b]: mean cosine of the teacher's CLS and patch features, for `observe`."""
    temperature: float
    means: dict[str, Tensor]
    """The batch's mean scores [1, prototypes] over all ranks, which the centre of that name follows after the step."""

    def slice(self, start: int, stop: int) -> SslTargets:
        """Of the images [start, stop)."""
        inside = (self.images >= start) & (self.images < stop)
        return replace(
            self,
            cls=self.cls[:, start:stop],
            patches=self.patches[inside],
            images=self.images[inside] - start,
            gram=None if self.gram is None else self.gram[:, start:stop],
            features=self.features[:, start:stop],
            logits=self.logits[:, start:stop],
            closeness=self.closeness[:, start:stop],
        )


@dataclass(frozen=True)
class _Student:
    """What the student says of b images."""

    cls: Tensor  # [2, b, dim]: features of the global crops' CLS tokens, before the head
    patches: Tensor  # [2 b, N, dim]
    global_logits: Tensor  # [2, b, prototypes]
    local_logits: Tensor | None  # [local crops, b, prototypes]; None without local crops
    patch_logits: Tensor | None  # [m, prototypes]: of the masked patches; None without iBOT


# --- the step ---------------------------------------------------------------------------------------------------------


def step(networks: SslNetworks, inputs: SslInputs) -> Outputs:
    """A rank's share of the losses and of what backward gives, for its part of the batch. Changes nothing.

    Raises ValueError if the Gram loss has a weight and there is no Gram teacher, or none of its crops.
    """

    def loss(batch: SslBatch, draws: Draws, targets: SslTargets) -> dict[str, Tensor]:
        return learn(networks.student, batch, draws, targets, inputs.scalars)

    with inputs.collectives():
        targets = teach(networks.teacher, networks.gram_teacher, inputs.batch, inputs.scalars)
        return add_up(networks.student.all(), inputs, targets, loss)


@torch.no_grad()
def teach(teacher: Trio, gram_teacher: VisionTransformer | None, batch: SslBatch, scalars: Scalars) -> SslTargets:
    """What the teachers say of a rank's part of the batch, all micro-batches at once. Every rank calls it: Sinkhorn
    normalises over the global batch."""
    masked = _masked(batch, scalars)
    with _autocast(batch, scalars.compute):
        features = teacher.backbone.features(batch.global_crops.flatten(0, 1))
        cls_logits = teacher.dino_head(features.cls)
        patch_logits = None if masked is None else _ibot_head(teacher)(_rows(features.patches, masked))
    cls, means = _centred(cls_logits, "dino_center", teacher.dino_center, scalars)
    patches, more = cls[:0], dict[str, Tensor]()
    if patch_logits is not None:
        patches, more = _centred(patch_logits, "ibot_center", teacher.ibot_center, scalars)
    return SslTargets(
        cls=_by_crop(cls, GLOBAL_CROPS),
        patches=patches,
        images=batch.masks.nonzero()[:, 1] if masked is not None else batch.positions[:0],
        gram=_gram_targets(gram_teacher, batch, scalars.compute) if scalars.weights["gram"] > 0 else None,
        features=_by_crop(features.cls, GLOBAL_CROPS),
        logits=_by_crop(cls_logits, GLOBAL_CROPS),
        closeness=_by_crop(_closeness(features), GLOBAL_CROPS),
        temperature=scalars.teacher_temp,
        means=means | more,
    )


def _centred(logits: Tensor, name: str, center: Center | None, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
    """The targets that a teacher's scores [n, K] come to; and for its centre, if it has one, the batch's mean."""
    if scalars.centering == "sinkhorn":
        return sinkhorn(logits, scalars.teacher_temp), {}
    if center is None:
        return centered(logits, logits.new_zeros(1, logits.shape[1]), scalars.teacher_temp), {}
    return centered(logits, center.center, scalars.teacher_temp), {name: batch_mean(logits)}


def _closeness(features: Features) -> Tensor:
    """Mean cosine of a crop's CLS with its patches, fp32 [crops]."""
    cls, patches = promote(features.cls), promote(features.patches)
    return torch.einsum("cd,cnd->cn", F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)).mean(dim=1)


def _masked(batch: SslBatch, scalars: Scalars) -> Tensor | None:
    """int64 [m]: which of the patches [2 b N] are masked; None without iBOT, when nothing is."""
    if scalars.weights["ibot"] == 0:
        return None
    return _beside(batch.masks.flatten().nonzero()[:, 0], batch)


def _beside(tensor: Tensor, batch: SslBatch) -> Tensor:
    """Where the crops are. Masks stay on the host, so that nobody waits for the device to count them."""
    return tensor.to(batch.global_crops.device, non_blocking=True)


def _rows(patches: Tensor, index: Tensor) -> Tensor:
    """Of patches [crops, N, dim] those with these numbers, [m, dim]."""
    return patches.flatten(0, 1).index_select(0, index)


def _ibot_head(networks: Trio) -> ProjectionHead:
    if networks.ibot_head is None:
        raise ValueError("the iBOT loss has a weight, and model.ibot_head is not there: give it, or `tied`")
    return networks.ibot_head


def learn(student: Trio, batch: SslBatch, draws: Draws, targets: SslTargets, scalars: Scalars) -> dict[str, Tensor]:
    """The loss of one micro-batch: scalars by name, and their weighted sum `total`, as shares of the global loss.

    fp32 (float64 for float64 networks), whatever the dtype of the products.
    """
    images, crops = scalars.images, GLOBAL_CROPS * scalars.images
    said = _student(student, batch, draws, scalars)
    temperature = scalars.student_temp
    terms = {"dino_global": dino_cross_entropy(said.global_logits, targets.cls, temperature, images, skip_same=True)}
    if said.patch_logits is not None:
        weights = mask_weights(batch.masks, torch.promote_types(said.patch_logits.dtype, torch.float32))
        weights = _beside(weights, batch)
        terms["ibot"] = ibot_cross_entropy(said.patch_logits, targets.patches, weights, temperature, crops)
    if said.local_logits is not None:
        terms["dino_local"] = dino_cross_entropy(said.local_logits, targets.cls, temperature, images)
    if scalars.weights["koleo"] > 0:
        terms["koleo"] = torch.stack(_koleo(said.cls, batch, scalars)).mean()
    if targets.gram is not None:
        terms["gram"] = _gram(said.patches, targets.gram.flatten(0, 1), scalars)
    return {**terms, "total": torch.stack([scalars.weights[name] * term for name, term in terms.items()]).sum()}


def _koleo(cls: Tensor, batch: SslBatch, scalars: Scalars) -> list[Tensor]:
    """For each crop of `cls` [2, b, dim]. A collective where a group is larger than the micro-batch."""
    size, images, count = scalars.group_size, scalars.images, cls.shape[1]
    if count % size == 0:
        return [koleo(features, size, images) for features in cls]
    everyone = parallel.all_gather(promote(cls), dim=1)
    first = int(batch.groups[0]) * (count // len(batch.groups))
    return [koleo_gathered(own, all_, first, size, images) for own, all_ in zip(cls, everyone, strict=True)]


def _gram(student: Tensor, teacher: Tensor, scalars: Scalars) -> Tensor:
    """Of patches [2 b, N, dim]."""
    crops = GLOBAL_CROPS * scalars.images
    if scalars.gram_group:
        student, teacher = (as_groups(patches, GLOBAL_CROPS, scalars.gram_group) for patches in (student, teacher))
        crops = scalars.images // scalars.gram_group
    return gram(student, teacher, crops, clamp=scalars.gram_clamp, clamped_student=not scalars.official_quirks)


def _student(student: Trio, batch: SslBatch, draws: Draws, scalars: Scalars) -> _Student:
    masked = _masked(batch, scalars)
    masks = None if masked is None else _beside(batch.masks.flatten(0, 1), batch)
    copies = len(batch.local_crops)
    views = [View(batch.global_crops.flatten(0, 1), masks, draws.of_global)]
    if copies:
        views.append(View(batch.local_crops.flatten(0, 1), perturbation=draws.of_local, local=True))
    with _autocast(batch, scalars.compute):
        features = student.backbone(views)
        whole = features[0]
        logits = _by_crop(student.dino_head(torch.cat([group.cls for group in features])), GLOBAL_CROPS + copies)
        return _Student(
            cls=_by_crop(whole.cls, GLOBAL_CROPS),
            patches=whole.patches,
            global_logits=logits[:GLOBAL_CROPS],
            local_logits=logits[GLOBAL_CROPS:] if copies else None,
            patch_logits=None if masked is None else _ibot_head(student)(_rows(whole.patches, masked)),
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
