"""Signs of collapse, measured now and then: a loss can fall while every image gets the same features.

Everything is over the global batch. Measuring changes nothing of the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    """[m, K]: the teacher's distributions over prototypes, rows that sum to 1; before Sinkhorn, which would hide it."""
    targets: Tensor | None = None
    """[m, K]: what the student was to match, rows that sum to 1."""
    closeness: Tensor | None = None
    """[n]: cosine of an image's CLS with its patches."""


@runtime_checkable
class Observable(Protocol):
    """An objective that has something to look at. One that has not, has no such method."""

    def observe(self, targets: Any) -> Observed:
        """What `targets` hold of it, without computing anything anew. The same fields on every rank."""
        ...


@torch.no_grad()
def measure(objective: object, targets: object, cross_entropy: Tensor | None = None) -> dict[str, float]:
    """The metrics of one step; every rank calls it. Empty for an objective that is not `Observable`.

    `cross_entropy`: of the student's global crops against the targets; less their entropy it is the KL divergence
    (arXiv 2104.14294, section 5.3).
    """
    if not isinstance(objective, Observable):
        return {}
    seen = objective.observe(targets)
    metrics = {}
    if seen.features is not None:
        metrics["health/effective_rank"] = effective_rank(seen.features)
    if seen.assignments is not None:
        entropy, used = assignment(seen.assignments)
        metrics["health/entropy"], metrics["health/prototypes_used"] = entropy, used
        metrics["health/information"] = math.log(used * seen.assignments.shape[1]) - entropy
    if seen.targets is not None and cross_entropy is not None:
        metrics["health/kl"] = float(cross_entropy) - assignment(seen.targets)[0]
    if seen.closeness is not None:
        metrics["health/cls_patch_cosine"] = _mean(seen.closeness)
    return metrics


LEAST_INFORMATION = 0.1
"""Nats that an assignment must say about the image; n images that are told apart give up to ln n."""
FEWEST_PROTOTYPES = 3
"""In use over the whole batch (exp of the entropy of the mean row), where there are many more to choose from."""
LEAST_RANK = 1.2
MOST_COSINE = 0.99
EXTREME = 0.1
"""Entropy below this share of ln K, or above one minus it, is at that end."""


def collapse(metrics: Mapping[str, float]) -> str:
    """What has collapsed, in words, from `measure`'s metrics; empty if nothing has.

    Assignments are collapsed when they say nothing of the image: the mutual information of image and prototype, the
    entropy of the mean row less the mean of the rows' entropies, is near 0, or next to no prototype is in use. Entropy
    says then which way it went.
    """
    found = [*_collapsed_assignments(metrics)]
    if (rank := metrics.get("health/effective_rank", math.inf)) < LEAST_RANK:
        found.append(f"features vary along one direction: effective rank {rank:.3g}")
    if (cosine := metrics.get("health/cls_patch_cosine", -1.0)) > MOST_COSINE:
        found.append(f"patches repeat the CLS token: cosine {cosine:.4f}")
    return ", and ".join(found)


def _collapsed_assignments(metrics: Mapping[str, float]) -> Iterator[str]:
    if "health/information" not in metrics:
        return
    information, entropy, used = (metrics[f"health/{name}"] for name in ("information", "entropy", "prototypes_used"))
    most = entropy + information - math.log(used)  # ln K
    in_use = used * math.exp(most)
    if entropy < EXTREME * most and (
        information < LEAST_INFORMATION or in_use < FEWEST_PROTOTYPES < math.exp(most) / 8
    ):
        yield (
            f"one dimension took over: the teacher's entropy is {entropy:.3g} of at most {most:.3g} nats, "
            f"{in_use:.1f} prototypes are in use"
        )
    elif information < LEAST_INFORMATION and entropy > (1 - EXTREME) * most:
        yield f"it went flat: the teacher's entropy is {entropy:.3g} of at most {most:.3g} nats"
    elif information < LEAST_INFORMATION:
        yield f"every image gets the same prototypes: they tell {information:.2g} nats about it"


def _mean(values: Tensor) -> float:
    total = values.double().sum()
    both = parallel.all_reduce_sum(torch.stack([total, total.new_tensor(float(len(values)))]))
    return float(both[0] / both[1])


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues (Roy & Vetterli 2007), between 1 and min(n-1, D).

    `features`: this rank's [n, D]. 1.0 if all rows of all ranks are alike, nan if one is not finite.
    """
    own = features.double()
    count = parallel.all_reduce_sum(torch.tensor(float(len(own)), dtype=own.dtype, device=own.device))
    mean = parallel.all_reduce_sum(own.sum(0)) / count
    centred = own - mean
    covariance = parallel.all_reduce_sum(centred.T @ centred)
    if not covariance.isfinite().all():  # the step is about to change nothing; eigvalsh would raise
        return math.nan
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
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
