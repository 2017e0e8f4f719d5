"""Sinkhorn-Knopp: teacher logits to targets that use every prototype alike.

Caron et al. 2020 (SwAV, arXiv 2006.09882, section 3.1 and appendix A); DINOv3 (arXiv 2508.10104, section 3.2) centres
with it, for the CLS token and, apart, for the masked patches. With n samples on all ranks, K prototypes, temperature T:

    Q = exp(logits / T)                                    [n, K]
    three times:  Q[:, k] /= K * sum_i Q[i, k]             every prototype gets the same mass
                  Q[i, :] /= n * sum_k Q[i, k]             every sample gets the same mass
    targets = n * Q                                        each row sums to 1

Here it runs on log Q, so that no logit overflows. The factors n and K are left out: each normalisation cancels what
the one before it scaled, and the last makes the rows sum to 1. So no count has to be agreed on between ranks.
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
    for _ in range(iterations):
        log_q = log_q - _log_mass_of_prototypes(log_q)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


def _log_mass_of_prototypes(log_q: Tensor) -> Tensor:
    """log sum_i Q[i, k] over the rows of all ranks, [K]; their maximum comes off first, as exp would overflow."""
    if len(log_q):
        peak = log_q.amax(dim=0)
    else:
        peak = log_q.new_full((log_q.shape[1],), -torch.inf)
    peak = parallel.all_reduce_max(peak)
    return parallel.all_reduce_sum((log_q - peak).exp().sum(dim=0)).log() + peak
