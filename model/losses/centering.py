"""Centering and sharpening: how DINO and DINOv2 keep a teacher from collapsing, instead of Sinkhorn-Knopp.

Caron et al. 2021 (arXiv 2104.14294, section 3.1, equation 4). With teacher logits z, temperature T and centre c:

    targets = softmax((z - c) / T)                      against c, computed from earlier batches
    c <- m * c + (1 - m) * mean over the batch of z     after the loss, over all ranks

Centering alone pushes towards the uniform distribution, a low temperature (sharpening) alone towards a single
prototype; each undoes the other's collapse. The mean is over all rows of all ranks: the released code takes the mean of
the ranks' means for masked patches, so that there it depends on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import parallel
from model.losses.precision import at_least_fp32
from model.networks.init import Rule


class Center(nn.Module):
    """Holds the centre, as a buffer that is saved; it has nothing to learn."""

    center: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.empty(1, prototypes))

    def initial(self) -> dict[str, Rule]:
        return {"center": 0.0}

    @torch.no_grad()
    def follow(self, mean: Tensor, momentum: float, finite: Tensor) -> None:
        """Move towards the batch's mean [1, K], in place, if `finite` (bool, on the device)."""
        moved = self.center * momentum + mean * (1 - momentum)
        self.center.copy_(torch.where(finite, moved, self.center))


@torch.no_grad()
@at_least_fp32
def centered(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Targets [n, K] for teacher logits [n, K] against a centre [1, K]. fp32 at least; no collective."""
    return ((logits - center) / temperature).softmax(dim=-1)


@torch.no_grad()
@at_least_fp32
def batch_mean(logits: Tensor) -> Tensor:
    """The mean [1, K] of the rows [n, K] of all ranks (collectives); zeros if there are none anywhere."""
    count = parallel.all_reduce_sum(logits.new_tensor(float(len(logits))))
    return parallel.all_reduce_sum(logits.sum(dim=0, keepdim=True)) / count.clamp(min=1)
