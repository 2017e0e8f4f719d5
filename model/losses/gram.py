"""Gram anchoring: patch similarities stay those of an early teacher.

DINOv3 (arXiv 2508.10104, section 4.2, equation 2; section 4.3 for features at higher resolution). With X_S, X_G the
L2-normalised patch features [N, D] of a crop from the student and the Gram teacher and C global crops over all ranks:

    L = 1 / (C * N^2) * sum_c || X_S X_S^T - X_G X_G^T ||_F^2

The mean over the entries, where equation 2 has their sum, is what the released code does. Over several crops at once
(not `img_level`), X holds the patches of all of them. Negative similarities may be set to zero first: on both sides, or
the teacher's, and then the student's where both are negative.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.precision import at_least_fp32

Clamp = Literal["none", "both", "teacher"]


@at_least_fp32
def gram(
    student: Tensor, teacher: Tensor, crops: int, *, clamp: Clamp = "none", clamped_student: bool = True
) -> Tensor:
    """This micro-batch's share of the loss, a scalar, for patch features [c, N, D] (not yet normalised) of c crops.

    `crops` is their number in the global batch. A "crop" may hold the patches of several (`as_groups`).
    `clamp`: whose negative similarities count as zero; "teacher": the student's too, but only where both are negative,
    and with `clamped_student` False never (the released code asks the teacher's after it was clamped).
    """
    s, t = _similarities(student), _similarities(teacher)
    if clamp == "both":
        s, t = s.clamp(min=0), t.clamp(min=0)
    elif clamp == "teacher":
        s = torch.where((s < 0) & (t < 0) & clamped_student, 0, s)
        t = t.clamp(min=0)
    return (s - t).square().sum() / (crops * student.shape[1] ** 2)


def as_groups(features: Tensor, crops: int, group_size: int) -> Tensor:
    """Patches [crops * b, N, D], crop-major, with those of a group of images together: [b / group, crops * group * N,
    D]. What the released code takes together is a rank's whole batch, which would change with the layout."""
    images = len(features) // crops
    split = features.reshape(crops, images // group_size, group_size, *features.shape[1:])
    return split.transpose(0, 1).flatten(1, 3)


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
