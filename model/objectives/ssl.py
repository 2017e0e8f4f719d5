"""DINOv3's self-distillation (arXiv 2508.10104) as an objective: what pretrain, gram and highres optimise.

The losses are `objectives.step`'s. Here is what a phase adds to them: networks, what the schedules and draws come to
at a step, hand-offs, the moving average and the Gram teacher's refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from model import config, ema
from model.data.batch import SslBatch
from model.data.views import SslViews, resolution_at
from model.health import Observed
from model.losses.centering import Center
from model.losses.dino import crop_scales
from model.losses.gram import Clamp
from model.networks.heads import ProjectionHead
from model.networks.init import Make, create
from model.networks.perturb import Layout, Perturbation, perturbation
from model.networks.vit import VisionTransformer
from model.objectives.base import Moment, Networks, ReadPart, State, copy_strictly, network_state
from model.objectives.pure import cut
from model.objectives.step import (
    GLOBAL_CROPS,
    Centering,
    Draws,
    Scalars,
    SslInputs,
    SslNetworks,
    SslTargets,
    Trio,
    learn,
    teach,
)
from model.schedules import value
from model.sealed import Stored

Settings = config.PretrainPhase | config.GramPhase | config.HighresPhase

WITH_GRAM_TEACHER = (config.GramPhase, config.HighresPhase)

N = TypeVar("N", bound=nn.Module)


class SslObjective:
    """An `objectives.base.Objective` over SslBatch and SslTargets."""

    def __init__(self, settings: Settings, model: config.Model, seed: int, origin: str, make: Make = create) -> None:
        self.settings, self.seed, self.origin = settings, seed, origin
        networks = create_networks(
            model,
            seed,
            gram_teacher=isinstance(settings, WITH_GRAM_TEACHER),
            centering=settings.losses.centering,
            official_quirks=settings.official_quirks,
            make=make,
        )
        self.student, self.teacher, self.gram_teacher = networks.student, networks.teacher, networks.gram_teacher
        self._means: dict[str, Tensor] = {}  # what the centres follow after the step, from the last targets

    def networks(self) -> Networks:
        student, teacher = self.student.all(), self.teacher.all()
        frozen = {f"teacher_{name}": network for name, network in teacher.items()}
        if self.gram_teacher is not None:
            frozen["gram_teacher"] = self.gram_teacher
        return Networks(trained=student, ema=[(student[name], teacher[name]) for name in student], frozen=frozen)

    def views(self, clock: int) -> SslViews:
        resolution = resolution_at(self.seed, self.origin, self.settings.crops, clock)
        return SslViews(resolution, self.student.backbone.settings.patch_size, gram=self.gram_teacher is not None)

    def targets(self, batch: SslBatch, moment: Moment) -> SslTargets:
        targets = teach(self.teacher, self.gram_teacher, batch, self.scalars(moment))
        self._means = targets.means
        return targets

    def loss(self, batch: SslBatch, targets: SslTargets, moment: Moment) -> dict[str, Tensor]:
        return learn(self.student, batch, self.draws(batch, moment), targets, self.scalars(moment))

    def scalars(self, moment: Moment) -> Scalars:
        """What settings and schedules come to at that step."""
        losses, optim = self.settings.losses, self.settings.optim
        return Scalars(
            images=optim.batch_size,
            group_size=self.settings.koleo_group,
            student_temp=losses.dino.student_temp,
            teacher_temp=value(losses.dino.teacher_temp, moment.step, moment.steps),
            weights=self._weights(moment),
            momentum=value(self.settings.ema, moment.step, moment.steps),
            compute=self.settings.precision.products,
            gram_compute=losses.gram.compute,
            centering=losses.centering,
            gram_group=0 if losses.gram.img_level else optim.group_size,
            gram_clamp=_clamp(losses.gram),
            official_quirks=self.settings.official_quirks,
        )

    def draws(self, batch: SslBatch, moment: Moment) -> Draws:
        """What disturbs the student on that micro-batch at that step, on the batch's device."""
        copies = len(batch.local_crops)
        return Draws(
            of_global=self._perturbation("global", GLOBAL_CROPS, batch, moment.clock),
            of_local=self._perturbation("local", copies, batch, moment.clock) if copies else None,
        )

    def step_networks(self) -> SslNetworks:
        return SslNetworks(self.student, self.teacher, self.gram_teacher)

    def step_inputs(self, batch: SslBatch, moment: Moment, micro_batches: int) -> SslInputs:
        parts = cut(batch, micro_batches)
        return SslInputs(batch, tuple(self.draws(part, moment) for part in parts), self.scalars(moment))

    def observe(self, targets: SslTargets) -> Observed:
        """For `model.health`: assignments before Sinkhorn, which would hide that few prototypes are in use."""
        assignments = targets.cls
        if self.settings.losses.centering == "sinkhorn":
            assignments = (targets.logits.float() / targets.temperature).softmax(dim=-1)
        return Observed(
            features=targets.features.flatten(0, 1),
            assignments=assignments.flatten(0, 1),
            targets=targets.cls.flatten(0, 1),
            closeness=targets.closeness.flatten(),
        )

    def after_step(self, moment: Moment, finite: Tensor) -> None:
        momentum = self.scalars(moment).momentum
        for student, teacher in self.networks().ema:
            ema.update(student, teacher, momentum, finite)
        for name, mean in self._means.items():
            center = self.teacher.heads()[name]
            assert isinstance(center, Center)
            center.follow(mean, self.settings.losses.center_momentum, finite)
        if self.gram_teacher is not None and self._refresh_due(moment.step + 1):
            ema.copy(self.teacher.backbone, self.gram_teacher)

    def state(self) -> dict[str, State]:
        parts = {
            "student": network_state(self.student.all()),
            "teacher_backbone": self.teacher.backbone.state_dict(),
            "teacher_heads": network_state(self.teacher.heads()),
        }
        return parts if self.gram_teacher is None else {**parts, "gram_teacher": self.gram_teacher.state_dict()}

    def load(self, part: str, tensors: Mapping[str, Tensor | Stored]) -> None:
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
            heads = {name: tensor for name, tensor in heads.items() if name.split(".")[0] in self.student.heads()}
            self.load("student", {**{f"backbone.{key}": tensor for key, tensor in backbone.items()}, **heads})
        elif name == "gram_teacher" and self.gram_teacher is not None:
            self.load("gram_teacher", read("teacher_backbone"))
        else:
            raise ValueError(f"a {self.settings.kind} phase takes no {name}")

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


def create_networks(
    model: config.Model,
    seed: int,
    *,
    gram_teacher: bool,
    centering: Centering = "sinkhorn",
    official_quirks: bool = False,
    make: Make = create,
) -> SslNetworks:
    """Fresh from `seed`; the teachers begin as the student does, without gradients."""
    backbone = _quirky(model.backbone) if official_quirks else model.backbone

    def transformer() -> VisionTransformer:
        return make(lambda: VisionTransformer(backbone), seed, "backbone")

    def trio(*, centres: bool) -> Trio:
        heads = {
            name: make(partial(ProjectionHead, head, backbone.dim), seed, name) for name, head in model.heads.items()
        }
        dino_head = heads["dino_head"]
        ibot_head = dino_head if model.ibot_head == "tied" else heads.get("ibot_head")
        dino_center, ibot_center = (
            make(partial(Center, head.prototypes), seed, "center") if centres and head is not None else None
            for head in (dino_head, ibot_head)
        )
        return Trio(transformer(), dino_head, ibot_head, dino_center, ibot_center)

    student, teacher = trio(centres=False), trio(centres=centering == "centering")
    for network in teacher.all().values():
        _freeze(network)
    return SslNetworks(student, teacher, _freeze(transformer()) if gram_teacher else None)


def _quirky(backbone: config.Backbone) -> config.Backbone:
    """As the released code trains it (docs/parity.md, traps 1 and 3)."""
    return backbone.model_copy(update={"rope_dtype": "bf16", "rope_per_block": True})


def _clamp(settings: config.Gram) -> Clamp:
    if settings.remove_neg:
        return "both"
    return "teacher" if settings.remove_only_teacher_neg else "none"


def _freeze(network: N) -> N:
    return network.requires_grad_(False).eval()
