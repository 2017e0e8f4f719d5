"""Signs of collapse, measured now and then: a loss can fall while every image gets the same features.

Everything is over the global batch. Measuring changes nothing of the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from model import parallel


@dataclass(frozen=True)
class Observed:
    """What an objective lets be looked at: this rank's share of the last step."""

    features: Tensor | None = None
    """[n, D]: CLS features of the teacher, one row a view."""
    assignments: Tensor | None = None
    """[m, K]: the teacher's distributions over prototypes, rows that sum to 1."""


@runtime_checkable
class Observable(Protocol):
    """An objective that has something to look at. One that has not, has no such method."""

    def observe(self, targets: Any) -> Observed:
        """What `targets` hold of it, without computing anything anew. The same fields on every rank."""
        ...


@torch.no_grad()
def measure(objective: object, targets: object) -> dict[str, float]:
    """The metrics of one step; every rank calls it. Empty for an objective that is not `Observable`."""
    if not isinstance(objective, Observable):
        return {}
    seen = objective.observe(targets)
    metrics = {}
    if seen.features is not None:
        metrics["health/effective_rank"] = effective_rank(seen.features)
    if seen.assignments is not None:
        metrics["health/entropy"], metrics["health/prototypes_used"] = assignment(seen.assignments)
    return metrics


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues (Roy & Vetterli 2007), between 1 and min(n-1, D).

    `features`: this rank's [n, D]. 1.0 if all rows of all ranks are alike.
    """
    own = features.double()
    count = parallel.all_reduce_sum(torch.tensor(float(len(own)), dtype=own.dtype, device=own.device))
    mean = parallel.all_reduce_sum(own.sum(0)) / count
    centred = own - mean
    values = torch.linalg.eigvalsh(parallel.all_reduce_sum(centred.T @ centred)).clamp(min=0)
    total = values.sum()
    # A share of the features' own size is rounding, not spread.
    if total <= 1e-12 * count * mean.square().sum():
        return 1.0
    return float(_entropy(values / total).exp())


def assignment(probabilities: Tensor) -> tuple[float, float]:
    """Mean entropy of the rows of [m, K] in nats (ln K: says nothing; 0: certain), and how many prototypes are in use:
    exp of the entropy of the mean row, over K (1: all alike; 1/K: always the same one)."""
    rows = probabilities.double()
    count = parallel.all_reduce_sum(torch.tensor(float(len(rows)), dtype=rows.dtype, device=rows.device))
    entropy = parallel.all_reduce_sum(_entropy(rows).sum()) / count
    used = _entropy(parallel.all_reduce_sum(rows.sum(0)) / count).exp() / rows.shape[1]
    return float(entropy), float(used)


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return entropy
