"""Drop path and RoPE augmentation as tensors: what a forward in training is disturbed by, drawn beforehand.

Draws are made per group of `group_size` consecutive images of the global batch, for the group's crops of one kind
("global", "local"), so that neither the number of processes nor of micro-batches shows in them.
RoPE is drawn once per forward, as the paper has it (the released code draws anew in every block: `rope_per_block`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    counts: tuple[int, ...] = ()
    """Where blocks differ in how many they keep: only the first so many of each block's `indices` count, and `scale`
    is for the last dimension's full length."""

    def kept(self, block: int) -> Kept | None:
        if self.indices is None:
            return None
        attention, ffn = self.indices[block]
        if not self.counts:
            return Kept(attention, ffn, self.scale)
        count = self.counts[block]
        return Kept(attention[:count], ffn[:count], self.scale * len(attention) / count)

    def to(self, device: torch.device) -> Perturbation:
        rope = None if self.rope is None else self.rope.to(device)
        return replace(self, rope=rope, indices=None if self.indices is None else self.indices.to(device))


@dataclass(frozen=True)
class Layout:
    """Which crops a forward sees: `copies` crops of each image of `groups`, group_size images a group."""

    kind: str  # "global", "local", ...: each kind has draws of its own
    groups: Sequence[int]  # numbers of the groups within the global batch
    group_size: int
    copies: int


def perturbation(settings: Backbone, layout: Layout, seed: int, origin: str, clock: int) -> Perturbation:
    """What disturbs the student's backbone on these crops at that step, on the CPU."""
    rope = rope_draws(settings, layout, seed, origin, clock)
    if settings.drop_path_depth == "linear" and settings.drop_path > 0:
        rates = np.linspace(0, settings.drop_path, settings.depth).tolist()
        return replace(drop_path_by_block(rates, layout, seed, origin, clock), rope=rope)
    indices, scale = drop_path(settings.drop_path, settings.depth, layout, seed, origin, clock)
    return Perturbation(rope, indices, scale)


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
    orders = _orders(blocks, layout, seed, origin, clock)
    return torch.from_numpy(np.concatenate([order[..., :keep] for order in orders], axis=2)), crops / keep


def drop_path_by_block(rates: Sequence[float], layout: Layout, seed: int, origin: str, clock: int) -> Perturbation:
    """`drop_path` with a rate for each block, of the same draws."""
    crops = layout.copies * layout.group_size
    keeps = [max(int(crops * (1 - rate)), 1) for rate in rates]
    orders = _orders(len(rates), layout, seed, origin, clock)
    indices = np.zeros((len(rates), 2, max(keeps) * len(orders)), np.int64)
    for block, keep in enumerate(keeps):
        indices[block, :, : keep * len(orders)] = np.concatenate([order[block, :, :keep] for order in orders], axis=1)
    counts = tuple(keep * len(orders) for keep in keeps)
    return Perturbation(None, torch.from_numpy(indices), crops / max(keeps), counts)


def _orders(blocks: int, layout: Layout, seed: int, origin: str, clock: int) -> list[npt.NDArray[np.int64]]:
    """For each group its crops in random order, anew for each block and branch: [blocks, 2, crops of a group]."""
    crops, images = layout.copies * layout.group_size, len(layout.groups) * layout.group_size
    orders = []
    for slot, group in enumerate(layout.groups):
        generator = draws.generator(seed, f"{origin}/drop-path/{layout.kind}", clock, group)
        copy, image = np.divmod(
            generator.permuted(np.tile(np.arange(crops), (blocks, 2, 1)), axis=2), layout.group_size
        )
        orders.append(copy * images + slot * layout.group_size + image)
    return orders


def rope_draws(settings: Backbone, layout: Layout, seed: int, origin: str, clock: int) -> RopeDraws | None:
    """Shift U(-s, s) and jitter log-uniform in [1/j, j], both an axis; rescale log-uniform in [1/r, r], for both axes.

    None if the backbone asks for none of the three. Five numbers are drawn always, so that none shifts another; with
    `rope_per_block` so many for each block, the first block's being those of one draw for all.
    """
    if settings.rope_shift is None and settings.rope_jitter is None and settings.rope_rescale is None:
        return None
    blocks = settings.depth if settings.rope_per_block else 1
    generators = [draws.generator(seed, f"{origin}/rope/{layout.kind}", clock, group) for group in layout.groups]
    draw = np.stack([generator.uniform(-1, 1, (blocks, 5)) for generator in generators], axis=1)
    shift = draw[..., 0:2] * (settings.rope_shift or 0.0)
    scale = np.exp(draw[..., 2:4] * np.log(settings.rope_jitter or 1.0))
    scale *= np.exp(draw[..., 4:5] * np.log(settings.rope_rescale or 1.0))
    both = RopeDraws(_per_crop(shift, layout), _per_crop(scale, layout))
    return both if settings.rope_per_block else both.at(0)


def _per_crop(values: npt.NDArray[np.float64], layout: Layout) -> Tensor:
    """[blocks, groups, 2] as fp32 [blocks, crops, 2]."""
    per_image = torch.from_numpy(values).float().repeat_interleave(layout.group_size, dim=1)
    return per_image.repeat(1, layout.copies, 1)
