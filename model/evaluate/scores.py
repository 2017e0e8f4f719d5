"""Scores of frozen features. Each gives, for every held-out image, the counts that the score is made of.

A `Counts` array is [n, k] (n held-out images); a score is a function of its column sums. So any resample of images is
scored by adding rows, which is what the bootstrap does (`model.evaluate.bootstrap`).

Protocols: k-NN as in DINO (arXiv 2104.14294, section 4.2: cosine similarity, votes weighted by exp(s / 0.07)), linear
probe by L2-regularised logistic regression (mean over random halves of the training images), dense probe by ridge
regression on single patches, recall at 1 for retrieval.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from model import draws

Floats: TypeAlias = NDArray[np.floating[Any]]
Ints: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = NDArray[np.float64]

NEIGHBOURS = 10
TEMPERATURE = 0.07
REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
"""Candidates for logistic regression's C, chosen on training images alone."""

LEAST_GROUPS = 3
"""Near-duplicate groups of training images: of two, one in each half, a half may never hold two classes."""


def mean_score(sums: Counts) -> float:
    """For counts [right, asked]: percent right. `sums` is [2]."""
    return float(100.0 * sums[0] / sums[1])


def mean_iou(sums: Counts) -> float:
    """For counts [intersection, union] of foreground, then of background: mean IoU in percent. `sums` is [4]."""
    return float(100.0 * 0.5 * (sums[0] / sums[1] + sums[2] / sums[3]))


def _asked(right: NDArray[np.bool_]) -> Counts:
    return np.stack([right.astype(np.float64), np.ones(len(right))], axis=1)


def unit(features: Floats) -> Floats:
    """Rows of length 1. `features` is [n, d]."""
    norms = np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return np.asarray(features / norms)


def knn(train: Floats, train_labels: Ints, test: Floats, test_labels: Ints, neighbours: int = NEIGHBOURS) -> Counts:
    """Weighted k-nearest-neighbour classification. Features [n, d], labels [n]; counts [m, 2] (right, asked)."""
    similarity = unit(test) @ unit(train).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE)
    votes = np.zeros((len(test), int(train_labels.max()) + 1))
    for column in range(nearest.shape[1]):
        np.add.at(votes, (np.arange(len(test)), train_labels[nearest[:, column]]), weights[:, column])
    return _asked(votes.argmax(axis=1) == test_labels)


def majority(train_labels: Ints, test_labels: Ints) -> Counts:
    """What always answering the commonest training label scores."""
    return _asked(test_labels == np.bincount(train_labels).argmax())


def linear_probe(
    train: Floats, train_labels: Ints, train_groups: Ints, test: Floats, test_labels: Ints, seed: int,
    probes: int,
) -> Counts:  # fmt: skip
    """Mean accuracy of `probes` logistic regressions, each on a random half of the training images (whole groups).

    One probe of a few hundred images tells as much about those images as about the features: the mean of ten varies by
    a third less (measured by cross-validation on the demo's training images). Features are standardised; C is what does
    best on the other halves of the training images. The halves depend on `seed` alone, so that networks are compared on
    the same ones.
    Raises ValueError unless the training images are of two classes and LEAST_GROUPS groups at least.
    """
    if len(np.unique(train_labels)) < 2 or len(np.unique(train_groups)) < LEAST_GROUPS:
        raise ValueError(f"no half of these images holds two classes: {len(np.unique(train_groups))} groups of them")
    inputs, held_out = _standardised(train, test)
    halves = [_half(train_groups, train_labels, seed, number) for number in range(probes)]

    def fitted(c: float) -> list[LogisticRegression]:
        return [_logistic(c, inputs[half], train_labels[half]) for half in halves]

    def validated(candidates: list[LogisticRegression]) -> float:
        pairs = zip(candidates, halves, strict=True)
        return float(np.mean([probe.score(inputs[~half], train_labels[~half]) for probe, half in pairs]))

    # One thread: these products are so small that a pool of threads spends its time waiting for itself.
    with threadpool_limits(limits=1):
        best = max(map(fitted, REGULARISATIONS), key=validated)
        right = np.mean([probe.predict(held_out) == test_labels for probe in best], axis=0)
    return np.stack([right, np.ones(len(right))], axis=1)


def _half(groups: Ints, labels: Ints, seed: int, number: int) -> NDArray[np.bool_]:
    """Which images are of a random half of the groups: the first that is drawn with two classes at least."""
    names, rng = np.unique(groups), draws.generator(seed, "evaluate/probe", number)
    while True:
        half = np.isin(groups, rng.permutation(names)[: (len(names) + 1) // 2])
        if len(np.unique(labels[half])) >= 2:
            return half


def _standardised(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both by the training images' mean and deviation; of more features than images, only the directions that the
    training images span, which is all that a regression with an L2 penalty can use."""
    scaler = StandardScaler().fit(train)
    inputs, held_out = scaler.transform(train), scaler.transform(test)
    if inputs.shape[1] <= len(inputs):
        return inputs, held_out
    _, _, directions = np.linalg.svd(inputs, full_matrices=False)
    return inputs @ directions.T, held_out @ directions.T


def _logistic(c: float, inputs: Floats, labels: Ints) -> LogisticRegression:
    with warnings.catch_warnings():
        # A candidate that has not converged in 300 iterations is judged as it is, by the same cross-validation.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(inputs, labels)


def dense_probe(
    train: Sequence[Floats], train_masks: Sequence[NDArray[np.bool_]], test: Sequence[Floats],
    test_masks: Sequence[NDArray[np.bool_]], strength: float = 1.0,
) -> Counts:  # fmt: skip
    """Foreground from single patches by ridge regression on their features.

    Per image: features [patches, d] and masks [patches]. Counts are [m, 4]: intersection and union of the foreground,
    then of the background, in patches.
    """
    inputs = np.concatenate(train)
    scaler = StandardScaler().fit(inputs)
    probe = Ridge(alpha=strength * len(inputs)).fit(scaler.transform(inputs), np.concatenate(train_masks) * 2.0 - 1.0)
    rows = []
    for features, mask in zip(test, test_masks, strict=True):
        said = probe.predict(scaler.transform(features)) > 0
        rows.append([(said & mask).sum(), (said | mask).sum(), (~said & ~mask).sum(), (~said | ~mask).sum()])
    return np.asarray(rows, dtype=np.float64)


def retrieval(queries: Floats, gallery: Floats, query_keys: Ints, gallery_keys: Ints) -> Counts:
    """Recall at 1 by cosine similarity: is the nearest of the gallery one of the query's own? Counts [n, 2].

    Keys [n] say what belongs together: near-duplicate groups for instances, equal texts for captions.
    """
    nearest = (unit(queries) @ unit(gallery).T).argmax(axis=1)
    return _asked(gallery_keys[nearest] == query_keys)


def chance(query_keys: Ints, gallery_keys: Ints) -> Counts:
    """What retrieval scores on average if it draws at random: the share of the gallery that is the query's own."""
    own = (query_keys[:, None] == gallery_keys[None, :]).mean(axis=1)
    return np.stack([own, np.ones(len(own))], axis=1)
