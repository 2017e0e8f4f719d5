"""Drop path and RoPE augmentation as tensors: what a forward in training is disturbed by, drawn beforehand.

Draws are made per group of `group_size` consecutive images of the global batch, for the group's crops of one kind
("global", "local"), so that neither the number of processes nor of micro-batches shows in them.
RoPE is drawn once per forward, as the paper has it (the released code draws anew in every block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import draws
from model.config import Backbone
from model.networks.blocks import Kept
from model.networks.rope import RopeDraws


@dataclass(frozen=True)
class Perturbation:
    """What disturbs one group of crops in one forward. Crops are crop-major: crop j of image i is at j * images + i."""

    rope: RopeDraws | None  # None: coordinates as they are
    indices: Tensor | None  # int64 [blocks, 2 (attention, FFN), kept]: crops that keep their residual; None: all do
    scale: float  # crops / kept

    def kept(self, block: int) -> Kept | None:
        if self.indices is None:
            return None
        attention, ffn = self.indices[block]
        return Kept(attention, ffn, self.scale)

    def to(self, device: torch.device) -> Perturbation:
        rope = None if self.rope is None else self.rope.to(device)
        return Perturbation(rope, None if self.indices is None else self.indices.to(device), self.scale)


@dataclass(frozen=True)
class Layout:
    """Which crops a forward sees: `copies` crops of each image of `groups`, group_size images a group."""

    kind: str  # "global", "local", ...: each kind has draws of its own
    groups: Sequence[int]  # numbers of the groups within the global batch
    group_size: int
    copies: int


def perturbation(settings: Backbone, layout: Layout, seed: int, origin: str, clock: int) -> Perturbation:
    """What disturbs the student's backbone on these crops at that step, on the CPU."""
    indices, scale = drop_path(settings.drop_path, settings.depth, layout, seed, origin, clock)
    return Perturbation(rope_draws(settings, layout, seed, origin, clock), indices, scale)


def drop_path(
    rate: float, blocks: int, layout: Layout, seed: int, origin: str, clock: int
) -> tuple[Tensor | None, float]:
    """Which crops keep their residual, uniform over depth, drawn apart for attention and FFN.

    Of a group's c crops, max(int(c * (1 - rate)), 1) are kept. Returns the indices (see Perturbation) and c / kept.
    """
    crops = layout.copies * layout.group_size
    keep = max(int(crops * (1 - rate)), 1)
    if rate == 0 or keep == crops:
        return None, 1.0
    images = len(layout.groups) * layout.group_size
    parts = []
    for slot, group in enumerate(layout.groups):
        generator = draws.generator(seed, f"{origin}/drop-path/{layout.kind}", clock, group)
        order = generator.permuted(np.tile(np.arange(crops), (blocks, 2, 1)), axis=2)[..., :keep]
        copy, image = np.divmod(order, layout.group_size)
        parts.append(copy * images + slot * layout.group_size + image)
    return torch.from_numpy(np.concatenate(parts, axis=2)), crops / keep


def rope_draws(settings: Backbone, layout: Layout, seed: int, origin: str, clock: int) -> RopeDraws | None:
    """Shift U(-s, s) and jitter log-uniform in [1/j, j], both an axis; rescale log-uniform in [1/r, r], for both axes.

    None if the backbone asks for none of the three. Five numbers are drawn always, so that none shifts another.
    """
    if settings.rope_shift is None and settings.rope_jitter is None and settings.rope_rescale is None:
        return None
    draw = np.stack(
        [
            draws.generator(seed, f"{origin}/rope/{layout.kind}", clock, group).uniform(-1, 1, 5)
            for group in layout.groups
        ]
    )
    shift = draw[:, 0:2] * (settings.rope_shift or 0.0)
    scale = np.exp(draw[:, 2:4] * np.log(settings.rope_jitter or 1.0))
    scale *= np.exp(draw[:, 4:5] * np.log(settings.rope_rescale or 1.0))
    return RopeDraws(_per_crop(shift, layout), _per_crop(scale, layout))


def _per_crop(values: npt.NDArray[np.float64], layout: Layout) -> Tensor:
    """[groups, 2] as fp32 [crops, 2]."""
    per_image = torch.from_numpy(values).float().repeat_interleave(layout.group_size, dim=0)
    return per_image.repeat(layout.copies, 1)
