"""The five scores of the table, each from features of training and held-out images to counts per held-out image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model import config
from model.data import text
from model.data.index import Entry
from model.evaluate import baselines, features, pictures, pixels, scores
from model.evaluate.features import Aligned, Extracted
from model.evaluate.pixels import Squares
from model.evaluate.report import Scored
from model.evaluate.scores import Counts, Floats, Ints
from model.networks.vit import VisionTransformer


@dataclass(frozen=True)
class Side:
    """Training or held-out images."""

    entries: list[Entry]
    squares: Squares

    @property
    def groups(self) -> Ints:
        return np.array([entry.group for entry in self.entries])

    def labels(self, names: list[str]) -> Ints:
        return np.array([names.index(entry.label or "") for entry in self.entries])


@dataclass(frozen=True)
class Seen:
    """What one network says of both sides."""

    network: VisionTransformer
    train: Extracted
    held_out: Extracted


@dataclass(frozen=True)
class Bench:
    """All that the tasks read."""

    settings: config.Evaluate
    seed: int
    train: Side
    held_out: Side
    trained: Seen
    untrained: Seen


def pixel_features(images: baselines.Images) -> dict[str, Floats]:
    """Of images without RGB there are no colours to count."""
    colours = {"colour histogram": baselines.colour_histogram(images)} if images.shape[3] == config.RGB else {}
    return {"raw pixels": baselines.raw_pixels(images), **colours}


def can_be_classified(bench: Bench) -> bool:
    """Whether there are classes to learn, and enough images to learn them from."""
    classes = {entry.label for entry in bench.train.entries} - {None}
    return len(classes) >= 2 and len(np.unique(bench.train.groups)) >= scores.LEAST_GROUPS


def classification(bench: Bench) -> list[Scored]:
    """k-NN on the CLS token and a linear probe on CLS joined with the mean patch, over the folders as classes."""
    names = sorted({entry.label or "" for entry in [*bench.train.entries, *bench.held_out.entries]})
    train_labels, labels = bench.train.labels(names), bench.held_out.labels(names)
    groups = bench.train.groups
    trivial = [pixel_features(side.squares.images) for side in (bench.train, bench.held_out)]

    def knn(train: Floats, held_out: Floats) -> Counts:
        return scores.knn(train, train_labels, held_out, labels)

    def probe(train: Floats, held_out: Floats) -> Counts:
        return scores.linear_probe(train, train_labels, groups, held_out, labels, bench.seed, bench.settings.probes)

    majority = {"majority": scores.majority(train_labels, labels)}
    found = []
    for name, kind, part in (("k-NN accuracy", knn, "cls"), ("linear probe accuracy", probe, "pooled")):
        trained, untrained = (
            kind(getattr(seen.train, part), getattr(seen.held_out, part)) for seen in (bench.trained, bench.untrained)
        )
        plain = {key: kind(trivial[0][key], trivial[1][key]) for key in trivial[0]}
        note = f"{len(names)} classes"
        if kind is probe:
            note += f"; mean of {bench.settings.probes} probes, each on a random half of the training images"
        found.append(
            Scored(name, trained, untrained, {**majority, **plain}, bench.held_out.groups, scores.mean_score, note)
        )
    return found


def dense(bench: Bench) -> Scored:
    """Foreground from single patch features, over the images that have transparent pixels."""
    patch = bench.trained.network.settings.patch_size
    kept, masks, plain = [], [], []
    for side in (bench.train, bench.held_out):
        kept.append(np.array([i for i, alpha in enumerate(side.squares.opacity) if alpha is not None]))
        masks.append([pixels.foreground(alpha, patch) for alpha in side.squares.opacity if alpha is not None])
        plain.append(baselines.patch_pixels(side.squares.images[kept[-1]], patch))
    places = baselines.position(len(masks[0][0]))

    def probe(train: Floats, held_out: Floats) -> Counts:
        return scores.dense_probe(list(train), masks[0], list(held_out), masks[1])

    def seen(by: Seen) -> Counts:
        return probe(by.train.patches[kept[0]], by.held_out.patches[kept[1]])

    by_place = probe(np.stack([places] * len(kept[0])), np.stack([places] * len(kept[1])))
    trivial = {"position only": by_place, "raw pixels": probe(plain[0], plain[1])}
    groups = bench.held_out.groups[kept[1]]
    note = f"{len(kept[1])} images with transparent pixels"
    return Scored("foreground mIoU", seen(bench.trained), seen(bench.untrained), trivial, groups, scores.mean_iou, note)


def instance_retrieval(bench: Bench) -> Scored:
    """Recall at 1 of a cropped, mirrored, recoloured view among the held-out images."""
    gallery, keys = bench.held_out.squares.images, bench.held_out.groups
    asked = pixels.queries(gallery, bench.seed)
    data, batch = bench.settings.data, bench.settings.batch_size

    def seen(by: Seen) -> Counts:
        queries = features.extract(by.network, asked, data, batch).cls
        return scores.retrieval(queries, by.held_out.cls, keys, keys)

    ours, theirs = pixel_features(asked), pixel_features(gallery)
    plain = {key: scores.retrieval(ours[key], theirs[key], keys, keys) for key in ours}
    trivial = {"chance": scores.chance(keys, keys), **plain}
    note = f"{len(keys)} images"
    return Scored(
        "instance retrieval R@1", seen(bench.trained), seen(bench.untrained), trivial, keys, scores.mean_score, note
    )


def caption_recall(bench: Bench, trained: Aligned, untrained: Aligned, tokens: Tensor, captioned: Ints) -> Scored:
    """Recall at 1 of an image by its caption. `captioned` are the held-out images that have one, `tokens` their ids."""
    images = bench.held_out.squares.images[captioned]
    data, batch = bench.settings.data, bench.settings.batch_size
    # Images of equal captions are all right answers to it.
    _, keys = np.unique([bench.held_out.entries[i].caption or "" for i in captioned], return_inverse=True)

    def seen(by: Aligned) -> Counts:
        texts = features.embed_texts(by, tokens, batch)
        return scores.retrieval(texts, features.embed_images(by, images, data, batch), keys, keys)

    groups = bench.held_out.groups[captioned]
    trivial = {"chance": scores.chance(keys, keys)}
    note = f"{len(keys)} captions"
    return Scored("caption-to-image R@1", seen(trained), seen(untrained), trivial, groups, scores.mean_score, note)


def drawn(bench: Bench) -> dict[str, bytes]:
    """PNG by name: patch features by principal components (untrained, then trained), and the attention heads. None of
    no images."""
    if not bench.settings.pictures:
        return {}
    patch = bench.trained.network.settings.patch_size
    some = np.linspace(0, len(bench.held_out.entries) - 1, bench.settings.pictures).astype(int)
    images = bench.held_out.squares.images[some]
    colours = [pictures.patch_pca(seen.held_out.patches[some]) for seen in (bench.untrained, bench.trained)]
    maps = features.attention(bench.trained.network, images, bench.settings.data)
    heads = pictures.attention_tiles(maps, images.shape[1] // patch)
    shown = pictures.shown(images)
    return {
        "pca.png": pictures.sheet(shown, colours),
        "attention.png": pictures.sheet(shown, [heads[:, head] for head in range(heads.shape[1])]),
    }


def look(network: VisionTransformer, train: Side, held_out: Side, settings: config.Evaluate) -> Seen:
    """Both sides through one network."""
    first, second = (
        features.extract(network, side.squares.images, settings.data, settings.batch_size) for side in (train, held_out)
    )
    return Seen(network, first, second)


def tokens_of(entries: list[Entry], captioned: Ints, tokenizer: str, context: int) -> Tensor:
    """Ids of the captions of those held-out images, int64 [n, context]."""
    return text.encode(text.load(tokenizer), [entries[i].caption or "" for i in captioned], context)
