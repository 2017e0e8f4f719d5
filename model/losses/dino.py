"""DINO's cross-entropy between crops of an image.

Caron et al. 2021 (arXiv 2104.14294, equation 3), as DINOv3 computes it. With teacher targets t of crop u, student
logits z of crop v, student temperature T, B images over all ranks:

    L = 1 / (B * pairs) * sum over images, pairs (u, v) of  - sum_k t[u, k] * log softmax(z[v] / T)[k]

`pairs` is S * T crops, or without the pairs of a crop with itself S * T - min(S, T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses.precision import at_least_fp32


@at_least_fp32
def dino_cross_entropy(
    student_logits: Tensor, targets: Tensor, temperature: float, images: int, *, skip_same: bool = False
) -> Tensor:
    """This micro-batch's share of the loss, a scalar.

    `student_logits` [S, b, K] and `targets` [T, b, K], crop-major over the same b images; `images` is their number in
    the global batch. `skip_same` leaves out pairs of equal crop index (student's and teacher's global crops).
    """
    log_p = (student_logits / temperature).log_softmax(dim=-1)
    pairs = -torch.einsum("sbk,tbk->st", log_p, targets)
    count = pairs.numel()
    if skip_same:
        pairs = pairs * ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
        count -= min(pairs.shape)
    return pairs.sum() / (images * count)


def crop_scales(global_crops: int, local_crops: int) -> tuple[float, float]:
    """What the global and the local DINO term weigh: their shares of all (student, teacher) pairs of unequal crops.

    With 2 global and 8 local crops 2/18 and 16/18 (DINOv3's released code). They sum to 1.
    """
    among_globals = global_crops * (global_crops - 1)
    with_locals = global_crops * local_crops
    return among_globals / (among_globals + with_locals), with_locals / (among_globals + with_locals)
