"""iBOT's cross-entropy on masked patches.

Zhou et al. 2021 (arXiv 2111.07832, equation 2), as DINOv3 computes it. With targets t and student logits z of masked
patch j in crop c, student temperature T, C global crops over all ranks (masked or not: 2 an image), M_c masked patches
in crop c:

    L = 1 / C * sum_c 1 / M_c * sum_j  - sum_k t[j, k] * log softmax(z[j] / T)[k]
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses.precision import at_least_fp32


@at_least_fp32
def ibot_cross_entropy(
    student_logits: Tensor, targets: Tensor, weights: Tensor, temperature: float, crops: int
) -> Tensor:
    """This micro-batch's share of the loss, a scalar; 0 (with a gradient path) if none of its patches is masked.

    `student_logits` and `targets` [m, K] of the m masked patches in the same order, `weights` [m] from `mask_weights`,
    `crops` the global crops of the global batch.
    """
    log_p = (student_logits / temperature).log_softmax(dim=-1)
    return -((targets * log_p).sum(dim=-1) * weights).sum() / crops


def mask_weights(masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 / (masked patches of its crop) for each masked patch [m], ordered as `features[masks]`; `masks` [..., N]."""
    counts = masks.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts.to(dtype).reciprocal().expand(masks.shape)[masks]
