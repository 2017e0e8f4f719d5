"""What the loader hands to an objective: one rank's part of one step, as tensors.

A rank's part and a micro-batch are contiguous slices of the global batch made of whole groups, so that a group's masks,
drop-path subsets and RoPE draws are the same for every number of ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, device


@dataclass(frozen=True)
class SslBatch:
    """Views of b images for self-distillation; normalised RGB, float32, crop-major (crop 0 of every image first)."""

    positions: Tensor
    """int64 [b]: where each image stands in the data order, counted from its origin."""
    groups: Tensor
    """int64 [b / group_size]: numbers of the groups in the global batch of this step."""
    global_crops: Tensor
    """[2, b, C, G, G]"""
    local_crops: Tensor
    """[L, b, C, l, l]"""
    gram_crops: Tensor | None
    """[2, b, C, g, g]: the boxes of the global crops, undistorted; None where no Gram teacher looks."""
    masks: Tensor
    """bool [2, b, N]: patches of the global crops that the student does not see (N: patches of one, row by row)."""

    def slice(self, start: int, stop: int) -> SslBatch:
        """Images start to stop. Raises ValueError unless both lie between groups."""
        images = slice(start, stop)
        return SslBatch(
            positions=self.positions[images],
            groups=self.groups[_whole_groups(self.positions, self.groups, start, stop)],
            global_crops=self.global_crops[:, images],
            local_crops=self.local_crops[:, images],
            gram_crops=None if self.gram_crops is None else self.gram_crops[:, images],
            masks=self.masks[:, images],
        )

    def to(self, where: device | str) -> SslBatch:
        """The same batch on another device; `positions` and `groups` name draws and stay where they are."""
        return SslBatch(
            positions=self.positions,
            groups=self.groups,
            global_crops=self.global_crops.to(where, non_blocking=True),
            local_crops=self.local_crops.to(where, non_blocking=True),
            gram_crops=None if self.gram_crops is None else self.gram_crops.to(where, non_blocking=True),
            masks=self.masks.to(where, non_blocking=True),
        )


@dataclass(frozen=True)
class PairBatch:
    """b images with their captions; images normalised RGB, float32."""

    positions: Tensor
    """int64 [b], as in SslBatch."""
    groups: Tensor
    """int64 [b / group_size], as in SslBatch."""
    images: Tensor
    """[b, C, H, W]"""
    tokens: Tensor
    """int64 [b, context]: start token, caption, end token, padding."""

    def slice(self, start: int, stop: int) -> PairBatch:
        """Images start to stop. Raises ValueError unless both lie between groups."""
        return PairBatch(
            positions=self.positions[start:stop],
            groups=self.groups[_whole_groups(self.positions, self.groups, start, stop)],
            images=self.images[start:stop],
            tokens=self.tokens[start:stop],
        )

    def to(self, where: device | str) -> PairBatch:
        """The same batch on another device; `positions` and `groups` name draws and stay where they are."""
        return PairBatch(
            positions=self.positions,
            groups=self.groups,
            images=self.images.to(where, non_blocking=True),
            tokens=self.tokens.to(where, non_blocking=True),
        )


Batch = SslBatch | PairBatch


def _whole_groups(positions: Tensor, groups: Tensor, start: int, stop: int) -> slice:
    """The groups of images start to stop."""
    size = len(positions) // len(groups)
    if not 0 <= start < stop <= len(positions) or start % size or stop % size:
        raise ValueError(
            f"images {start} to {stop} of {len(positions)} are not whole groups of {size}: "
            "a micro-batch must begin and end between groups"
        )
    return slice(start // size, stop // size)
