"""Scores and their intervals, against closed forms and the plain way of computing them."""

import numpy as np
import pytest

from model.evaluate import baselines, bootstrap, pictures, scores

RNG = np.random.default_rng(0)


def clusters(n: int, classes: int = 4, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Features around one corner a class, and the labels."""
    labels = np.arange(n) % classes
    return np.eye(classes, 8)[labels] + spread * RNG.normal(size=(n, 8)), labels


def test_knn_and_linear_probe_find_separable_classes_and_no_more():
    train, train_labels = clusters(160, spread=0.05)
    test, test_labels = clusters(40, spread=0.05)
    groups = np.arange(160)
    for counts in (
        scores.knn(train, train_labels, test, test_labels),
        scores.linear_probe(train, train_labels, groups, test, test_labels, seed=0, probes=10),
    ):
        assert scores.mean_score(counts.sum(axis=0)) == 100.0
    noise = RNG.normal(size=(400, 8))
    counts = scores.knn(train, train_labels, noise, np.arange(400) % 4)
    assert 15 < scores.mean_score(counts.sum(axis=0)) < 35


def test_each_linear_probe_sees_half_of_the_groups_and_every_network_the_same_halves():
    groups = np.repeat(np.arange(20), 3)
    labels = np.arange(60) % 2
    halves = [scores._half(groups, labels, seed=0, number=number) for number in range(10)]
    for half in halves:
        assert len(np.unique(groups[half])) == 10
        assert not set(groups[half]) & set(groups[~half])
    assert len({half.tobytes() for half in halves}) == 10
    assert np.array_equal(halves[3], scores._half(groups, labels, seed=0, number=3))


def test_no_linear_probe_sees_one_class_alone():
    train, labels = clusters(40, classes=2)
    one_group = np.where(labels == 1, -1, np.arange(40))  # all of a class are near-duplicates of each other
    counts = scores.linear_probe(train, labels, one_group, train, labels, seed=0, probes=10)
    assert scores.mean_score(counts.sum(axis=0)) == 100.0
    for two_groups in (np.where(labels == 1, -1, 0), np.zeros(40, int)):
        with pytest.raises(ValueError, match="no half of these images holds two classes"):
            scores.linear_probe(train, labels, two_groups, train, labels, seed=0, probes=10)


def test_the_linear_probe_loses_nothing_where_features_outnumber_images():
    train, test = RNG.normal(size=(20, 50)), RNG.normal(size=(10, 50))
    inputs, held_out = scores._standardised(train, test)
    assert inputs.shape[1] == 20
    scaled = (test - train.mean(axis=0)) / train.std(axis=0)
    within = (train - train.mean(axis=0)) / train.std(axis=0)
    np.testing.assert_allclose(held_out @ inputs.T, scaled @ within.T, atol=1e-9)  # all that the probe depends on


def test_knn_weighs_votes_by_similarity():
    train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = np.array([0, 1, 1])
    query = np.array([[1.0, 0.1]])
    assert scores.knn(train, labels, query, np.array([0]), neighbours=3)[0, 0] == 1.0  # one near beats two far


def test_majority_answers_the_commonest_training_label():
    counts = scores.majority(np.array([2, 2, 0]), np.array([2, 0, 2, 2]))
    assert scores.mean_score(counts.sum(axis=0)) == 75.0


def test_dense_probe_separates_patches_and_mean_iou_is_the_mean_of_both_classes():
    masks = [RNG.random(16) > 0.5 for _ in range(12)]
    features = [np.where(mask[:, None], 1.0, -1.0) + 0.1 * RNG.normal(size=(16, 4)) for mask in masks]
    counts = scores.dense_probe(features[:8], masks[:8], features[8:], masks[8:])
    assert counts.shape == (4, 4)
    assert scores.mean_iou(counts.sum(axis=0)) == 100.0
    assert scores.mean_iou(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(100 * (0.5 + 0.75) / 2)


def test_retrieval_counts_a_near_duplicate_as_the_same_instance():
    gallery = np.eye(4)
    keys = np.array([0, 1, 1, 3])
    queries = gallery[[0, 2, 1, 0]]  # the last one finds the first image, which is another instance
    counts = scores.retrieval(queries, gallery, keys, keys)
    assert counts[:, 0].tolist() == [1, 1, 1, 0]
    assert scores.chance(keys, keys)[:, 0].tolist() == [0.25, 0.5, 0.5, 0.25]


def test_interval_of_independent_images_is_the_binomial_one():
    right = (np.arange(400) % 4 > 0).astype(float)
    counts = np.stack([right, np.ones(400)], axis=1)
    got = bootstrap.interval(counts, np.arange(400), scores.mean_score, 4000, seed=0)
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert got.value == 75.0
    assert got.low == pytest.approx(75 - half, abs=0.6)
    assert got.high == pytest.approx(75 + half, abs=0.6)


def test_resampling_by_group_widens_the_interval_of_repeated_images():
    right = (np.arange(40) % 2).astype(float)
    counts = np.stack([np.repeat(right, 10), np.ones(400)], axis=1)
    alone = bootstrap.interval(counts, np.arange(400), scores.mean_score, 1000, seed=0)
    grouped = bootstrap.interval(counts, np.repeat(np.arange(40), 10), scores.mean_score, 1000, seed=0)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_difference_is_paired():
    right = RNG.random(300) > 0.5
    a = np.stack([right.astype(float), np.ones(300)], axis=1)
    better = right.copy()
    better[:15] = True
    b = np.stack([better.astype(float), np.ones(300)], axis=1)
    gain = bootstrap.difference(b, a, np.arange(300), scores.mean_score, 1000, seed=0)
    assert gain.value == pytest.approx(100 * (better.sum() - right.sum()) / 300)
    assert gain.low > 0.0  # two unpaired intervals would overlap by far
    same = bootstrap.difference(a, a, np.arange(300), scores.mean_score, 1000, seed=0)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_baselines_see_colour_and_place():
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    assert baselines.raw_pixels(red).shape == (1, 16 * 16 * 3)
    histogram = baselines.colour_histogram(np.concatenate([red, np.zeros_like(red)]))
    assert histogram.shape == (2, 512)
    assert histogram[0] @ histogram[0] == pytest.approx(1.0)
    assert histogram[0] @ histogram[1] == 0.0
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    patches = baselines.patch_pixels(picture, 8)
    assert patches.shape == (1, 4, 192)
    assert np.allclose((patches[0, 1] + 0.5) * 255, picture[0, :8, 8:].reshape(-1))


def test_pictures_are_pngs_of_the_stated_size():
    features = RNG.normal(size=(3, 16, 8))
    colours = pictures.patch_pca(features)
    assert colours.shape == (3, 4, 4, 3)
    heads = pictures.attention_tiles(RNG.random((3, 2, 16)), grid=4)
    png = pictures.sheet(np.zeros((3, 32, 32, 3), np.uint8), [colours, heads[:, 0], heads[:, 1]])
    assert png.startswith(b"\x89PNG")
