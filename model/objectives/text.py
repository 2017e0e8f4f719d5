"""Text alignment (dino.txt, arXiv 2412.16334): a text tower and a few blocks learn to agree over a frozen backbone.

The loss is `objectives.text_step`'s. Here is what a phase adds to it: networks, draws, hand-offs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model import config
from model.data.batch import PairBatch
from model.data.views import PairViews
from model.networks.init import Make, create
from model.networks.perturb import Layout, Perturbation, drop_path
from model.networks.text import LogitScale, TextTower, VisionHead
from model.networks.vit import VisionTransformer
from model.objectives.base import Moment, Networks, ReadPart, State, copy_strictly, network_state
from model.objectives.pure import cut
from model.objectives.text_step import (
    TextDraws,
    TextInputs,
    TextNetworks,
    TextScalars,
    TextTargets,
    Towers,
    learn,
    teach,
)
from model.sealed import Stored


class TextObjective:
    """Contrastive loss of images and captions. There is no teacher; the vision tower stays as it was handed over."""

    def __init__(
        self, settings: config.TextPhase, model: config.Model, seed: int, origin: str, make: Make = create
    ) -> None:
        self.settings, self._seed, self._origin = settings, seed, origin
        towers = Towers(embed_dim=settings.embed_dim, text=settings.text, head=settings.head)
        self._networks = create_networks(model, towers, seed, make)
        self._scalars = TextScalars(settings.optim.batch_size, settings.precision.products)

    def networks(self) -> Networks:
        return Networks(trained=self._networks.trained(), frozen={"vision_tower": self._networks.tower})

    def views(self, clock: int) -> PairViews:
        return PairViews(self.settings.image_size, self.settings.text.context)

    def targets(self, batch: PairBatch, moment: Moment) -> TextTargets:
        return teach(self._networks, batch, self._draws(batch, moment), self._scalars)

    def loss(self, batch: PairBatch, targets: TextTargets, moment: Moment) -> dict[str, Tensor]:
        return learn(self._networks, batch, self._draws(batch, moment), targets, self._scalars)

    def step_networks(self) -> TextNetworks:
        return self._networks

    def step_inputs(self, batch: PairBatch, moment: Moment, micro_batches: int) -> TextInputs:
        parts = cut(batch, micro_batches)
        return TextInputs(batch, tuple(self._draws(part, moment) for part in parts), self._scalars)

    def after_step(self, moment: Moment, finite: Tensor) -> None:
        """Nothing follows: there is no teacher."""

    def state(self) -> dict[str, State]:
        return {
            "student": network_state(self._networks.trained()),
            "teacher_backbone": self._networks.tower.state_dict(),
        }

    def load(self, part: str, tensors: Mapping[str, Tensor | Stored]) -> None:
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

    def _draws(self, batch: PairBatch, moment: Moment) -> TextDraws:
        """The drop path of the vision head's blocks on that micro-batch at that step."""
        head = self.settings.head
        layout = Layout("image", batch.groups.tolist(), self.settings.optim.group_size, copies=1)
        indices, scale = drop_path(head.drop_path, head.blocks, layout, self._seed, self._origin, moment.clock)
        return TextDraws(Perturbation(None, indices, scale).to(batch.images.device))


def create_networks(model: config.Model, towers: Towers, seed: int, make: Make = create) -> TextNetworks:
    """Fresh from `seed`; the vision tower without gradients."""
    backbone, embed_dim = model.backbone, towers.embed_dim
    return TextNetworks(
        tower=make(lambda: VisionTransformer(backbone), seed, "backbone").requires_grad_(False),
        head=make(lambda: VisionHead(towers.head, backbone.dim, backbone.heads, embed_dim), seed, "vision_head"),
        text=make(lambda: TextTower(towers.text, embed_dim), seed, "text_tower"),
        scale=make(LogitScale, seed, "logit_scale"),
    )
