"""Gram anchoring: patch similarities stay those of an early teacher.

DINOv3 (arXiv 2508.10104, section 4.2, equation 2; section 4.3 for features at higher resolution). With X_S, X_G the
L2-normalised patch features [N, D] of a crop from the student and the Gram teacher and C global crops over all ranks:

    L = 1 / (C * N^2) * sum_c || X_S X_S^T - X_G X_G^T ||_F^2

The mean over the entries, where equation 2 has their sum, is what the released code does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.losses.precision import at_least_fp32


@at_least_fp32
def gram(student: Tensor, teacher: Tensor, crops: int) -> Tensor:
    """This micro-batch's share of the loss, a scalar, for patch features [c, N, D] (not yet normalised) of c crops.

    `crops` is their number in the global batch.
    """
    return (_similarities(student) - _similarities(teacher)).square().sum() / (crops * student.shape[1] ** 2)


def _similarities(features: Tensor) -> Tensor:
    x = F.normalize(features, dim=-1)
    return x @ x.mT


@at_least_fp32
def resize_features(features: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patch features [c, h * w, D] of a grid `size` (h, w) as those of a grid `to`, [c, h' * w', D]: bicubic, without
    antialiasing, after the final norm and before the L2 normalisation, as DINOv3 does."""
    if size == to:
        return features
    maps = features.mT.reshape(len(features), -1, *size)
    return F.interpolate(maps, size=to, mode="bicubic", align_corners=False, antialias=False).flatten(2).mT
