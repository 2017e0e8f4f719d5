"""What the loader hands to an objective: one rank's part of one step, as tensors.

A rank's part and a micro-batch are contiguous slices of the global batch made of whole groups, so that a group's masks,
drop-path subsets and RoPE draws are the same for every number of ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SslBatch:
    """Views of b images for self-distillation; normalised, float32 (float64 under `compute: fp64`), crop-major (crop 0
    of every image first)."""

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

    def to(self, where: torch.device | str, dtype: torch.dtype | None = None) -> SslBatch:
        """The same batch on another device, its crops in `dtype`; `positions` and `groups` name draws and stay where
        they are, and so do `masks`, so that nobody waits for the device to count them."""
        return replace(
            self,
            global_crops=_moved(self.global_crops, where, dtype),
            local_crops=_moved(self.local_crops, where, dtype),
            gram_crops=None if self.gram_crops is None else _moved(self.gram_crops, where, dtype),
        )


@dataclass(frozen=True)
class PairBatch:
    """b images with their captions; images normalised, in the dtypes of SslBatch."""

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

    def to(self, where: torch.device | str, dtype: torch.dtype | None = None) -> PairBatch:
        """The same batch on another device, its images in `dtype`; `positions` and `groups` name draws and stay."""
        return replace(self, images=_moved(self.images, where, dtype), tokens=_moved(self.tokens, where))


Batch = SslBatch | PairBatch


def _moved(tensor: Tensor, where: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Without waiting for a GPU: that takes memory that the system does not move."""
    pinned = tensor.pin_memory() if torch.device(where).type == "cuda" else tensor
    return pinned.to(where, dtype, non_blocking=True)


def _whole_groups(positions: Tensor, groups: Tensor, start: int, stop: int) -> slice:
    """The groups of images start to stop."""
    size = len(positions) // len(groups)
    if not 0 <= start < stop <= len(positions) or start % size or stop % size:
        raise ValueError(
            f"images {start} to {stop} of {len(positions)} are not whole groups of {size}: "
            "a micro-batch must begin and end between groups"
        )
    return slice(start // size, stop // size)
