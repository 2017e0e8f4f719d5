"""The contrastive loss of image and text (CLIP, arXiv 2103.00020, figure 3; dino.txt, arXiv 2412.16334).

With x_i, y_i the L2-normalised embeddings of the B pairs of the global batch and a scale s:

    L = 1 / 2B * sum over i of  - log softmax_j(s x_i . y_j)[i] - log softmax_j(s y_i . x_j)[i]

Every pair is every other's negative, so L is no sum over pairs. A micro-batch therefore computes all of L with its
own rows live and the others' as constants: the gradient that reaches its rows is exactly that of L. Value and
gradient of the scale, which every micro-batch sees in full, are its share, m / B: both sum to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses.precision import at_least_fp32


@at_least_fp32
def contrastive(
    images: Tensor, texts: Tensor, scale: Tensor, all_images: Tensor, all_texts: Tensor, first: int
) -> Tensor:
    """This micro-batch's share of the loss, a scalar.

    images, texts: normalised [m, E], live, the pairs [first, first + m) of the global batch; scale: scalar, live;
    all_images, all_texts: normalised [B, E], of the whole global batch, without gradient.
    """
    share = len(images) / len(all_images)
    x, y = _with_live_rows(all_images, images, first), _with_live_rows(all_texts, texts, first)
    logits = (scale.detach() + share * (scale - scale.detach())) * (x @ y.T)
    pairs = torch.arange(len(x), device=x.device)
    whole = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return share * whole.detach() + (whole - whole.detach())


def _with_live_rows(everything: Tensor, rows: Tensor, first: int) -> Tensor:
    return torch.cat((everything[:first], rows, everything[first + len(rows) :]))
