"""DINOv3's self-distillation (arXiv 2508.10104): what pretrain, gram and highres optimise.

    total = w_dino * (scale_global * L_dino_global + scale_local * local_weight * L_dino_local)     section 3.2
          + w_ibot * L_ibot + w_koleo * 2 * L_koleo + w_gram * L_gram                             section 4.2

with the scales of `losses.dino.crop_scales` and L_koleo the mean over the two global crops. The student sees masked
global crops and local crops; the teacher, its moving average, sees the global crops whole; the Gram teacher, an
earlier teacher, sees them undistorted and, as a rule, larger (section 4.3).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from model import config, ema
from model.data.batch import SslBatch
from model.data.views import SslViews, resolution_at
from model.health import Observed
from model.losses.dino import crop_scales, dino_cross_entropy
from model.losses.gram import gram, resize_features
from model.losses.ibot import ibot_cross_entropy, mask_weights
from model.losses.koleo import koleo
from model.losses.sinkhorn import sinkhorn
from model.networks.heads import ProjectionHead
from model.networks.init import create
from model.networks.perturb import Layout, Perturbation, perturbation
from model.networks.vit import View, VisionTransformer
from model.objectives.base import Moment, Networks, ReadPart, State, copy_strictly, network_state
from model.schedules import value

Settings = config.PretrainPhase | config.GramPhase | config.HighresPhase

GLOBAL_CROPS = 2

N = TypeVar("N", bound=nn.Module)


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
class _Student:
    """What the student says of b images."""

    cls: Tensor  # [2, b, dim]: features of the global crops' CLS tokens, before the head
    patches: Tensor  # [2 b, N, dim]
    global_logits: Tensor  # [2, b, prototypes]
    local_logits: Tensor | None  # [local crops, b, prototypes]; None without local crops
    patch_logits: Tensor  # [m, prototypes]: of the masked patches


@dataclass(frozen=True)
class _Trio:
    """A backbone and its two heads: the student, or the teacher."""

    backbone: VisionTransformer
    dino_head: ProjectionHead
    ibot_head: ProjectionHead

    def heads(self) -> dict[str, nn.Module]:
        return {"dino_head": self.dino_head, "ibot_head": self.ibot_head}

    def all(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, **self.heads()}


class SslObjective:
    """An `objectives.base.Objective` over SslBatch and SslTargets."""

    def __init__(self, settings: Settings, model: config.Model, seed: int, origin: str) -> None:
        self.settings, self.seed, self.origin = settings, seed, origin
        dim = model.backbone.dim
        self.student = _Trio(
            create(lambda: VisionTransformer(model.backbone), seed, "backbone"),
            create(lambda: ProjectionHead(model.dino_head, dim), seed, "dino_head"),
            create(lambda: ProjectionHead(model.ibot_head, dim), seed, "ibot_head"),
        )
        self.teacher = _Trio(
            _frozen_copy(self.student.backbone),
            _frozen_copy(self.student.dino_head),
            _frozen_copy(self.student.ibot_head),
        )
        has_gram_teacher = isinstance(settings, config.GramPhase | config.HighresPhase)
        self.gram_teacher = _frozen_copy(self.student.backbone) if has_gram_teacher else None

    def networks(self) -> Networks:
        student, teacher = self.student.all(), self.teacher.all()
        frozen = {f"teacher_{name}": network for name, network in teacher.items()}
        if self.gram_teacher is not None:
            frozen["gram_teacher"] = self.gram_teacher
        return Networks(trained=student, ema=[(student[name], teacher[name]) for name in student], frozen=frozen)

    def views(self, clock: int) -> SslViews:
        resolution = resolution_at(self.seed, self.origin, self.settings.crops, clock)
        return SslViews(resolution, self.student.backbone.settings.patch_size, gram=self.gram_teacher is not None)

    @torch.no_grad()
    def targets(self, batch: SslBatch, moment: Moment) -> SslTargets:
        masks = batch.masks.flatten(0, 1)
        with self._autocast(batch):
            features = self.teacher.backbone.features(batch.global_crops.flatten(0, 1))
            cls_logits = self.teacher.dino_head(features.cls)
            patch_logits = self.teacher.ibot_head(features.patches[masks])
        temperature = value(self.settings.losses.dino.teacher_temp, moment.step, moment.steps)
        return SslTargets(
            cls=_by_crop(sinkhorn(cls_logits, temperature), GLOBAL_CROPS),
            patches=sinkhorn(patch_logits, temperature),
            images=batch.masks.nonzero()[:, 1],
            gram=self._gram_targets(batch) if self._gram_weight(moment) > 0 else None,
            features=_by_crop(features.cls, GLOBAL_CROPS),
            logits=_by_crop(cls_logits, GLOBAL_CROPS),
            temperature=temperature,
        )

    def loss(self, batch: SslBatch, targets: SslTargets, moment: Moment) -> dict[str, Tensor]:
        optim, losses = self.settings.optim, self.settings.losses
        images, crops = optim.batch_size, GLOBAL_CROPS * optim.batch_size
        temperature = losses.dino.student_temp
        student = self._student(batch, moment.clock)
        terms = {
            "dino_global": dino_cross_entropy(student.global_logits, targets.cls, temperature, images, skip_same=True),
            "ibot": ibot_cross_entropy(
                student.patch_logits, targets.patches, mask_weights(batch.masks), temperature, crops
            ),
        }
        if student.local_logits is not None:
            terms["dino_local"] = dino_cross_entropy(student.local_logits, targets.cls, temperature, images)
        if losses.koleo.weight > 0:
            by_crop = [koleo(features, optim.group_size, images) for features in student.cls]
            terms["koleo"] = torch.stack(by_crop).mean()
        if targets.gram is not None:
            terms["gram"] = gram(student.patches, targets.gram.flatten(0, 1), crops)
        weights = self._weights(moment)
        return {**terms, "total": torch.stack([weights[name] * term for name, term in terms.items()]).sum()}

    def observe(self, targets: SslTargets) -> Observed:
        """For `model.health`: assignments before Sinkhorn, which would hide that few prototypes are in use."""
        assignments = (targets.logits.flatten(0, 1).float() / targets.temperature).softmax(dim=-1)
        return Observed(targets.features.flatten(0, 1), assignments)

    def after_step(self, moment: Moment) -> None:
        momentum = value(self.settings.ema, moment.step, moment.steps)
        for student, teacher in self.networks().ema:
            ema.update(student, teacher, momentum)
        if self.gram_teacher is not None and self._refresh_due(moment.step + 1):
            ema.copy(self.teacher.backbone, self.gram_teacher)

    def state(self) -> dict[str, State]:
        parts = {
            "student": network_state(self.student.all()),
            "teacher_backbone": self.teacher.backbone.state_dict(),
            "teacher_heads": network_state(self.teacher.heads()),
        }
        return parts if self.gram_teacher is None else {**parts, "gram_teacher": self.gram_teacher.state_dict()}

    def load(self, part: str, tensors: State) -> None:
        own = self.state()
        if part not in own:
            raise ValueError(f"a {self.settings.kind} phase has no part {part}; it has {', '.join(own)}")
        copy_strictly(own[part], tensors, part)

    def frozen_parts(self) -> set[str]:
        refreshes = self.settings.losses.gram.refresh_every and self.settings.losses.gram.refresh_most
        # With refreshes it goes into every checkpoint: whether one has happened would be state to keep.
        return set() if self.gram_teacher is None or refreshes else {"gram_teacher"}

    def take(self, name: str, read: ReadPart) -> None:
        if name == "init":
            for part in ("student", "teacher_backbone", "teacher_heads"):
                self.load(part, read(part))
        elif name == "weights":
            backbone, heads = read("teacher_backbone"), read("teacher_heads")
            self.load("teacher_backbone", backbone)
            self.load("teacher_heads", heads)
            self.load("student", {**{f"backbone.{key}": tensor for key, tensor in backbone.items()}, **heads})
        elif name == "gram_teacher" and self.gram_teacher is not None:
            self.load("gram_teacher", read("teacher_backbone"))
        else:
            raise ValueError(f"a {self.settings.kind} phase takes no {name}")

    def _student(self, batch: SslBatch, clock: int) -> _Student:
        global_view = View(
            batch.global_crops.flatten(0, 1),
            batch.masks.flatten(0, 1),
            self._perturbation("global", GLOBAL_CROPS, batch, clock),
        )
        copies = len(batch.local_crops)
        with self._autocast(batch):
            if copies:
                draws = self._perturbation("local", copies, batch, clock)
                local_view = View(batch.local_crops.flatten(0, 1), perturbation=draws, local=True)
                whole, local = self.student.backbone([global_view, local_view])
                logits = _by_crop(self.student.dino_head(torch.cat([whole.cls, local.cls])), GLOBAL_CROPS + copies)
            else:
                (whole,) = self.student.backbone([global_view])
                logits = _by_crop(self.student.dino_head(whole.cls), GLOBAL_CROPS)
            return _Student(
                cls=_by_crop(whole.cls, GLOBAL_CROPS),
                patches=whole.patches,
                global_logits=logits[:GLOBAL_CROPS],
                local_logits=logits[GLOBAL_CROPS:] if copies else None,
                patch_logits=self.student.ibot_head(whole.patches[batch.masks.flatten(0, 1)]),
            )

    def _gram_targets(self, batch: SslBatch) -> Tensor:
        if self.gram_teacher is None or batch.gram_crops is None:
            raise ValueError("the Gram loss needs gram_crops in the batch and a phase with a gram_teacher")
        with self._autocast(batch):
            patches = self.gram_teacher.features(batch.gram_crops.flatten(0, 1)).patches
        seen, wanted = self._grid(batch.gram_crops), self._grid(batch.global_crops)
        return _by_crop(resize_features(patches, seen, wanted), GLOBAL_CROPS)

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        size = self.student.backbone.settings.patch_size
        return crops.shape[-2] // size, crops.shape[-1] // size

    def _perturbation(self, kind: str, copies: int, batch: SslBatch, clock: int) -> Perturbation:
        layout = Layout(kind, batch.groups.tolist(), self.settings.optim.group_size, copies)
        draws = perturbation(self.student.backbone.settings, layout, self.seed, self.origin, clock)
        return draws.to(batch.global_crops.device)

    def _weights(self, moment: Moment) -> dict[str, float]:
        losses = self.settings.losses
        among_globals, with_locals = crop_scales(GLOBAL_CROPS, self.settings.crops.local_count)
        local_weight = value(losses.dino.local_weight, moment.step, moment.steps)
        return {
            "dino_global": losses.dino.weight * among_globals,
            "dino_local": losses.dino.weight * with_locals * local_weight,
            "ibot": losses.ibot.weight,
            "koleo": losses.koleo.weight * GLOBAL_CROPS,
            "gram": self._gram_weight(moment),
        }

    def _gram_weight(self, moment: Moment) -> float:
        if self.gram_teacher is None:
            return 0.0
        return value(self.settings.losses.gram.weight, moment.step, moment.steps)

    def _refresh_due(self, done: int) -> bool:
        """Whether the Gram teacher becomes the EMA teacher after `done` updates of the phase."""
        gram_settings = self.settings.losses.gram
        every = gram_settings.refresh_every
        return every > 0 and done % every == 0 and done // every <= gram_settings.refresh_most

    def _autocast(self, batch: SslBatch) -> torch.autocast:
        bf16 = self.settings.precision.compute == "bf16"
        return torch.autocast(batch.global_crops.device.type, dtype=torch.bfloat16, enabled=bf16)


def _frozen_copy(network: N) -> N:
    return copy.deepcopy(network).requires_grad_(False).eval()


def _by_crop(rows: Tensor, crops: int) -> Tensor:
    """[crops * b, ...], crop-major, as [crops, b, ...]."""
    return rows.reshape(crops, -1, *rows.shape[1:])
