"""Sinkhorn-Knopp: teacher logits to targets that use every prototype alike.

Caron et al. 2020 (SwAV, arXiv 2006.09882, section 3.1 and appendix A); DINOv3 (arXiv 2508.10104, section 3.2) centres
with it, for the CLS token and, apart, for the masked patches. With n samples on all ranks, K prototypes, temperature T:

    Q = exp(logits / T)                                    [n, K]
    three times:  Q[:, k] /= K * sum_i Q[i, k]             every prototype gets the same mass
                  Q[i, :] /= n * sum_k Q[i, k]             every sample gets the same mass
    targets = n * Q                                        each row sums to 1

The factors n and K are left out: each normalisation cancels what the one before it scaled, and the last makes the rows
sum to 1. So no count has to be agreed on between ranks.

The first round runs on log Q, so that no logit overflows. It leaves at least 1 / (n K) in the row and the column of
every largest logit, so that no later sum can vanish: the other rounds divide Q itself, in place, and the whole takes
about as long as the plain formula (tests/benchmarks/losses.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import parallel
from model.losses.precision import at_least_fp32


@torch.no_grad()
@at_least_fp32
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets [n, K] for teacher logits [n, K] of this rank, normalised over all ranks (a collective).

    A rank may hold no rows (no masked patch fell to it), but must call. fp32 at least; finite logits give
    finite targets.
    """
    log_q = logits / temperature
    peak = _peak_of_prototypes(log_q)
    q = (log_q - peak).exp_()  # the buffer of the targets
    log_q -= parallel.all_reduce_sum(q.sum(dim=0)).log() + peak
    torch.softmax(log_q, dim=1, out=q)
    for _ in range(iterations - 1):
        q /= parallel.all_reduce_sum(q.sum(dim=0))
        q /= q.sum(dim=1, keepdim=True)
    return q


def _peak_of_prototypes(log_q: Tensor) -> Tensor:
    """Each prototype's largest entry over the rows of all ranks, [K]: it comes off before exp, which would overflow."""
    if len(log_q):
        peak = log_q.amax(dim=0)
    else:
        peak = log_q.new_full((log_q.shape[1],), -torch.inf)
    return parallel.all_reduce_max(peak)
