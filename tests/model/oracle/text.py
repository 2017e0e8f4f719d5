"""dino.txt's text tower and vision head (arXiv 2412.16334) again, one caption and one image at a time, from tensors by
name. Imports nothing of model/."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.model.oracle.network import Disturbed, Weights, blocks, norm


def text_tower(w: Weights, ids: list[int]) -> Tensor:
    """[E] of a caption: causal, read at the end token, which has the largest id."""
    x = torch.stack([w["token_embedding.weight"][one] + w["positional_embedding"][at] for at, one in enumerate(ids)])
    x = blocks(w, x, Disturbed(), causal=True)
    return w["projection.weight"] @ norm(w, "norm", x)[ids.index(max(ids))]


def vision_head(w: Weights, prefix: Tensor, patches: Tensor, how: Disturbed) -> Tensor:
    """[E] of a frozen tower's CLS and registers [1 + R, D] and patches [N, D]: CLS, and the mean of the patches."""
    x = norm(w, "norm", blocks(w, torch.cat([prefix, patches]), how))
    whole, mean = x[0], x[len(prefix) :].mean(dim=0)
    return torch.cat([w["projection.weight"] @ part if "projection.weight" in w else part for part in (whole, mean)])
